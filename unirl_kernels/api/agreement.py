"""What the ranks of a split vocabulary have to agree on: compared before they work together, so that none waits for a
rank that works on something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.api.described import compared_lines, hash_of, shown_lines
from unirl_kernels.api.rows import as_rows
from unirl_kernels.batch import Batch
from unirl_kernels.checks import has_values
from unirl_kernels.collectives import all_gather, all_texts
from unirl_kernels.objectives import Loss
from unirl_kernels.operators.rows import check_targets
from unirl_kernels.operators.shards import ShardArgs, Tiles, target_hash
from unirl_kernels.shard import VocabShard


class LossArgs(NamedTuple):
    """What a loss is computed of, as it was given: nobody has checked it."""

    batch: Batch
    loss: Loss

    @property
    def target(self) -> Tensor:
        # What has no target is refused by the check of the types.
        return self.batch.target if isinstance(self.batch, Batch) else torch.empty(0, dtype=torch.int64)


class Brought(NamedTuple):
    """What a rank brings of its own arguments."""

    columns: int  # of its logits, or rows of its weight, padding included
    row_bytes: int = 0  # memory for the logits of one token of a linear head
    wants: int = 0  # which gradients of a linear head
    max_chunk_bytes: int | None = None


class Terms(NamedTuple):
    """What ranks exchange. All but start, columns and row_bytes has to be the same everywhere."""

    refused: int  # whether the rank refuses its own arguments
    start: int
    columns: int
    row_bytes: int
    vocab: int
    tiles: int  # 0 for None
    wants: int
    max_chunk_bytes: int  # -1 for None
    dims: int
    first: int  # sizes of target
    last: int
    call: int = 0  # from here on hashes
    operand: int = 0
    hidden: int = 0
    readout: int = 0
    batch: int = 0
    loss: int = 0
    hash: int = 0  # of targets


ARGUMENTS = {
    "call": "the function that is called",
    "operand": "the input",
    "hidden": "shard.hidden",
    "readout": "readout",
    "batch": "batch",
    "loss": "loss",
}
"""Compared by a hash, and told as text where the hashes differ."""

NAMES = {
    "vocab": "shard.vocab",
    "tiles": "shard.tiles",
    "dims": "target.dim()",
    "first": "target.shape[0]",
    "last": "target.shape[-1]",
    "max_chunk_bytes": "plan.max_chunk_bytes",
    "wants": "what requires a gradient (1: hidden, 2: weight, 4: bias, added up)",
}

_known: set[tuple[VocabShard, Terms]] = set()
"""What has been compared on accelerators."""


def agreed(
    shard: VocabShard,
    operand: object,
    target: object,
    check: Callable[[], Brought],
    arguments: Mapping[str, object],
    *,
    waits: bool = False,
) -> tuple[ShardArgs, int]:
    """This rank's shard as operators take it, and the largest ``row_bytes`` of all ranks.

    On the CPU ranks compare in each call what they bring. They must not go by what they remember: exchanges of other
    sizes than the others' give garbage with gloo, or end the process. On an accelerator, where comparing waits for the
    device, what has been compared is remembered, without numbers, which change from step to step, and targets are
    compared by their hash in the exchange that follows. Compiled code compares the targets alone.

    Args:
        shard: the shard.
        operand: logits or hidden states: refused arguments are told to the other ranks on its device.
        target: of all tokens, or what was given in its place.
        check: what this rank brings; raises for arguments that it refuses.
        arguments: what else has to be the same, by the names of ``ARGUMENTS``.
        waits: whether the call waits for the device in any case.

    Raises:
        RuntimeError: when another rank refuses its arguments.
        ValueError: when the ranks do not agree, on every rank, naming a rank and its value.
        IndexError: when a target is outside the vocabulary.
    """
    if torch.compiler.is_compiling() or (isinstance(target, Tensor) and not has_values(target)):
        own = check()
        return _args(shard, own.columns, same_targets=False), own.row_bytes
    try:
        own = check()
        assert isinstance(target, Tensor)
        values = waits or not reading_waits(target)
        terms = _terms(shard, own, target, {k: compared_lines(v, values) for k, v in arguments.items()})
    except Exception:
        device = next((x.device for x in (operand, target) if isinstance(x, Tensor)), torch.device("cpu"))
        _exchanged(shard, Terms(1, *[0] * (len(Terms._fields) - 1)), device)
        raise
    if values:
        row_bytes = _compared(shard, terms._replace(hash=int(target_hash(target))), target, arguments)
        return _args(shard, own.columns, same_targets=True), row_bytes
    if (shard, terms) not in _known:
        _compared(shard, terms, target, arguments)
        _known.add((shard, terms))
    return _args(shard, own.columns, same_targets=False), own.row_bytes


def _terms(shard: VocabShard, own: Brought, target: Tensor, lines: Mapping[str, Sequence[str]]) -> Terms:
    most = -1 if own.max_chunk_bytes is None else own.max_chunk_bytes
    sizes = (target.dim(), target.shape[0], target.shape[-1])
    numbers = (shard.start, own.columns, own.row_bytes, shard.vocab, shard.tiles or 0, own.wants, most, *sizes)
    return Terms(0, *numbers, **{name: hash_of(text) for name, text in lines.items()})


def reading_waits(target: Tensor) -> bool:
    """Whether the values of a tensor are there only after waiting for a device."""
    return target.device.type != "cpu"


def _args(shard: VocabShard, columns: int, same_targets: bool) -> ShardArgs:
    tiles = Tiles(shard.tile, shard.slots)
    return ShardArgs(shard.start, shard.used(columns), shard.vocab, shard.ranks, same_targets, tiles)


def _compared(shard: VocabShard, own: Terms, target: Tensor, arguments: Mapping[str, object]) -> int:
    """The largest ``row_bytes``, if the ranks agree."""
    everyone = _exchanged(shard, own, target.device)
    for rank, terms in enumerate(everyone):
        if terms.refused:
            raise RuntimeError(f"shard: rank {rank} of its group refuses its arguments; its error says why")
    _check_told(shard, everyone, "call", target.device, arguments)
    for field, name in NAMES.items():
        values = [getattr(terms, field) for terms in everyone]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"{name} must be the same on all ranks of shard.group, got {_shown(field, values[0])} on rank 0 "
                    f"and {_shown(field, value)} on rank {rank}"
                )
    _check_layout(everyone)
    for name in ARGUMENTS:
        _check_told(shard, everyone, name, target.device, arguments)
    if len({terms.hash for terms in everyone}) > 1:
        raise ValueError(_differing_targets(shard, target))
    check_targets(as_rows(target), shard.vocab)
    return max(terms.row_bytes for terms in everyone)


def _exchanged(shard: VocabShard, own: Terms, device: torch.device) -> list[Terms]:
    sent = torch.tensor(own, dtype=torch.int64, device=device)
    return [Terms(*row) for row in all_gather(sent, shard.ranks).tolist()]


def _check_told(
    shard: VocabShard, everyone: Sequence[Terms], name: str, device: torch.device, arguments: Mapping[str, object]
) -> None:
    """Raise a ``ValueError`` where an argument differs; what differs is exchanged as text."""
    hashes = [getattr(terms, name) for terms in everyone]
    rank = next((k for k, other in enumerate(hashes) if other != hashes[0]), None)
    if rank is None:
        return
    own = shown_lines(arguments[name], values=True) if name in arguments else ["nothing"]
    texts = [text.split("\n") for text in all_texts("\n".join(own), shard.ranks, device)]
    for here, there in zip_longest(texts[0], texts[rank], fillvalue="nothing"):
        if here != there:
            break
    raise ValueError(
        f"{ARGUMENTS[name]} must be the same on all ranks of shard.group, got {here.lstrip('=.')} on rank 0 and "
        f"{there.lstrip('=.')} on rank {rank}"
    )


def _shown(field: str, value: int) -> str:
    none = {"max_chunk_bytes": -1, "tiles": 0}
    return "None" if none.get(field) == value else str(value)


def _check_layout(everyone: Sequence[Terms]) -> None:
    """Raise a ``ValueError`` unless the shards follow one another and hold the whole vocabulary."""
    end = 0
    for rank, terms in enumerate(everyone):
        if terms.start != end:
            before = f", where the {everyone[rank - 1].columns} columns of rank {rank - 1} end" if rank else ""
            raise ValueError(f"shard.start must be {end} on rank {rank}{before}, got {terms.start}")
        end += terms.columns
    vocab = everyone[0].vocab
    if end < vocab:
        raise ValueError(f"the shards must hold all {vocab} columns of shard.vocab, got {end} on {len(everyone)} ranks")


def _differing_targets(shard: VocabShard, target: Tensor) -> str:
    """The first position where a rank has another target than rank 0."""
    everyone = all_gather(target, shard.ranks)
    rank, *at = (everyone != everyone[:1]).nonzero()[0].tolist()
    here, there = int(everyone[(0, *at)]), int(everyone[(rank, *at)])
    return (
        f"target must be the same on all ranks of shard.group, got {here} on rank 0 and {there} on rank {rank} "
        f"at {tuple(at)}"
    )
