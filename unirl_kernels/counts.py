"""Counts over ranks, for aggregations under data parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.collectives import all_reduce, group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def global_count(batch: Batch, group: ProcessGroup, of: Literal["tokens", "sequences", "pairs"] = "tokens") -> Tensor:
    """How many tokens, sequences or pairs the batches of all ranks hold: ``count=`` of an aggregation.

    With it the loss of the step is the sum of the ranks' losses. One all-reduce of 8 bytes, without waiting for the
    device. Counts of micro-batches can be added up.

    Args:
        batch: of this rank. Sequences that are split over a ``sequence_group`` count once.
        group: all ranks whose losses are added up; not those that share a vocabulary, which have the same loss.
        of: what is counted: valid tokens (``TokenMean``), sequences (``SequenceMean``, ``FixedLength``) or pairs
            (``PairMean``).

    Returns:
        0-dim float64.

    Raises:
        TypeError: when ``batch`` is not a ``Batch``, or ``group`` not a process group.
        ValueError: when ``of`` is another word, or the sequences of pairs are odd in number.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> uk.global_count(uk.Batch(torch.tensor([[5, 7], [8, uk.IGNORE]])), dist.group.WORLD)
        tensor(3., dtype=torch.float64)
        >>> dist.destroy_process_group()
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"batch must be a Batch, got {type(batch).__name__}")
    ranks = group_of("group", group)
    if of not in ("tokens", "sequences", "pairs"):
        raise ValueError(f"of must be 'tokens', 'sequences' or 'pairs', got {of!r}")
    if of == "tokens":
        own = batch.valid.sum().double()
    else:
        parts = 1 if batch.ranks is None else batch.ranks.size
        n = batch.n_sequences if of == "sequences" else batch.n_pairs
        own = torch.full((), n / parts, dtype=torch.float64, device=batch.target.device)
    return all_reduce(own, ranks)
