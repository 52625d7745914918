"""Counts and batches of all ranks, for data parallelism."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unirl_kernels.batch import FIELDS, Batch
from unirl_kernels.checks import name_of
from unirl_kernels.ranks.collectives import Group, all_gather, all_reduce, all_texts, group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


UNKNOWN_TO_GROUPS = (torch.int16, torch.uint16, torch.uint32, torch.uint64)
"""Dtypes that process groups do not exchange."""


def global_count(batch: Batch, group: ProcessGroup, of: Literal["tokens", "sequences", "pairs"] = "tokens") -> Tensor:
    """The number of tokens, sequences or pairs in the batches of all ranks, for ``count=`` of an aggregation.

    With this count the loss of the step is the sum of the ranks' losses. It takes one all-reduce of 8 bytes, and does
    not wait for the device. The counts of micro-batches can be added.

    Args:
        batch: of this rank. Sequences that are split over a ``sequence_group`` count once.
        group: all ranks whose losses are added. Ranks that share a vocabulary have the same loss and are not in it.
        of: what is counted: valid tokens (``TokenMean``), sequences (``SequenceMean``, ``FixedLength``) or pairs
            (``PairMean``).

    Returns:
        0-dim float64. NaN if another rank raises one of the errors below for its batch.

    Raises:
        TypeError: when ``batch`` is not a ``Batch``, or ``group`` not a process group.
        ValueError: when ``of`` is not one of the three words, or when pairs are counted and the number of sequences is
            odd.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> uk.global_count(uk.Batch(torch.tensor([[5, 7], [8, uk.IGNORE]])), dist.group.WORLD)
        tensor(3., dtype=torch.float64)
        >>> dist.destroy_process_group()
    """
    ranks = group_of("group", group)
    if of not in ("tokens", "sequences", "pairs"):
        raise ValueError(f"of must be 'tokens', 'sequences' or 'pairs', got {of!r}")
    try:
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch, got {type(batch).__name__}")
        own = _count(batch, of)
    except (TypeError, ValueError):
        device = batch.target.device if isinstance(batch, Batch) else torch.device("cpu")
        with suppress(RuntimeError):  # a group may have no backend for this device
            all_reduce(torch.full((), torch.nan, dtype=torch.float64, device=device), ranks)  # the others wait for it
        raise
    return all_reduce(own, ranks)


def _count(batch: Batch, of: str) -> Tensor:
    """This rank's part of the count."""
    if of == "tokens":
        return batch.valid.sum().double()
    parts = 1 if batch.ranks is None else batch.ranks.size
    n = batch.n_sequences if of == "sequences" else batch.n_pairs
    return torch.full((), n / parts, dtype=torch.float64, device=batch.target.device)


def global_batch(batch: Batch, group: ProcessGroup) -> Batch:
    """The batches of all ranks as one batch, in the order of ranks; for ``VocabShard.of_fsdp``.

    Targets, fields and lengths are gathered. A 0-dim field is not: this rank's value is used. Waits for the device
    once.

    Args:
        batch: the batch of this rank; its shapes and dtypes must be the same on all ranks.
        group: the ranks.

    Returns:
        A batch with the sequences of all n ranks, [n B, L] or [n T]. Losses of pairs need ``pairs="interleaved"``.

    Raises:
        TypeError: when ``batch`` is not a ``Batch``, or ``group`` not a process group.
        ValueError: on every rank, when shapes or dtypes differ, or when sequences are split over a ``sequence_group``.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> uk.global_batch(uk.Batch(torch.tensor([[5, 7]])), dist.group.WORLD).target
        tensor([[5, 7]])
        >>> dist.destroy_process_group()
    """
    ranks = group_of("group", group)
    known = isinstance(batch, Batch)
    device = batch.target.device if known else torch.device("cpu")
    everyone = all_texts(_shapes(batch) if known else "no batch", ranks, device)
    if not known:
        raise TypeError(f"batch must be a Batch, got {type(batch).__name__}")
    for rank, text in enumerate(everyone):
        if text != everyone[0]:
            raise ValueError(
                f"batch must have the same shapes and dtypes on all ranks, got {everyone[0]} on rank 0 and {text} on "
                f"rank {rank}"
            )
    if batch.ranks is not None:
        raise ValueError("batch must hold whole sequences, got one with a sequence_group")
    fields = {name: _of_all(x, ranks) for name, x in sorted(batch.given().items())}
    advantage, old_logp, ref_logp = (fields.pop(name, None) for name in FIELDS)
    ends = batch.cu_seqlens
    if ends is not None:
        later = torch.arange(ranks.size, device=ends.device).to(ends.dtype)[:, None] * batch.target.numel()
        ends = torch.cat([ends[:1], (all_gather(ends, ranks)[:, 1:] + later).flatten()])
    target, named = _of_all(batch.target, ranks), batch.sequence_fields
    return Batch(target, advantage, old_logp, ref_logp, ends, fields, batch.pairs, sequence_fields=named)


def _shapes(batch: Batch) -> str:
    tensors = {"target": batch.target, **dict(sorted(batch.given().items()))}
    if batch.cu_seqlens is not None:
        tensors["cu_seqlens"] = batch.cu_seqlens
    shapes = [f"{name} {name_of(x.dtype)} {tuple(x.shape)}" for name, x in tensors.items()]
    split = "" if batch.ranks is None else ", sequence_group"
    named = "" if batch.sequence_fields is None else f", sequence_fields {sorted(batch.sequence_fields)}"
    return f"{', '.join(shapes)}, pairs {batch.pairs!r}{named}{split}"


def _of_all(x: Tensor, ranks: Group) -> Tensor:
    if not x.dim():
        return x
    x = x.contiguous()
    if x.dtype not in UNKNOWN_TO_GROUPS:
        return all_gather(x, ranks).flatten(0, 1)
    return all_gather(x.view(torch.uint8), ranks).flatten(0, 1).view(x.dtype)
