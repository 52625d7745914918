"""What the ranks of a split vocabulary have to agree on: compared before they work together, so that none waits for a
rank that works on something else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.api.rows import as_rows
from unirl_kernels.batch import has_values
from unirl_kernels.collectives import all_gather
from unirl_kernels.operators.rows import check_targets
from unirl_kernels.operators.shards import ShardArgs, Tiles, target_hash
from unirl_kernels.shard import VocabShard


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
    hash: int


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
    shard: VocabShard, target: Tensor, check: Callable[[], Brought], *, waits: bool = False
) -> tuple[ShardArgs, int]:
    """This rank's shard as operators take it, and the largest ``row_bytes`` of all ranks.

    On the CPU ranks compare in each call what they bring. They must not go by what they remember: exchanges of other
    sizes than the others' give garbage with gloo, or end the process. On an accelerator, where comparing waits for the
    device, what has been compared is remembered, and targets are compared by their hash in the exchange that follows.
    Compiled code compares the targets alone.

    Args:
        shard: the shard.
        target: of all tokens.
        check: what this rank brings; raises for arguments that it refuses.
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
    except Exception:
        device = target.device if isinstance(target, Tensor) else torch.device("cpu")
        _exchanged(shard, Terms(1, *[0] * 11), device)
        raise
    most = -1 if own.max_chunk_bytes is None else own.max_chunk_bytes
    sizes = (target.dim(), target.shape[0], target.shape[-1])
    terms = Terms(0, shard.start, own.columns, own.row_bytes, shard.vocab, shard.tiles or 0, own.wants, most, *sizes, 0)
    if waits or not reading_waits(target):
        row_bytes = _compared(shard, terms._replace(hash=int(target_hash(target))), target)
        return _args(shard, own.columns, same_targets=True), row_bytes
    if (shard, terms) not in _known:
        _compared(shard, terms, target)
        _known.add((shard, terms))
    return _args(shard, own.columns, same_targets=False), own.row_bytes


def reading_waits(target: Tensor) -> bool:
    """Whether the values of a tensor are there only after waiting for a device."""
    return target.device.type != "cpu"


def _args(shard: VocabShard, columns: int, same_targets: bool) -> ShardArgs:
    tiles = Tiles(shard.tile, shard.slots)
    return ShardArgs(shard.start, shard.used(columns), shard.vocab, shard.ranks, same_targets, tiles)


def _compared(shard: VocabShard, own: Terms, target: Tensor) -> int:
    """The largest ``row_bytes``, if the ranks agree."""
    everyone = _exchanged(shard, own, target.device)
    for rank, terms in enumerate(everyone):
        if terms.refused:
            raise RuntimeError(f"shard: rank {rank} of its group refuses its arguments; its error says why")
    for field, name in NAMES.items():
        values = [getattr(terms, field) for terms in everyone]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"{name} must be the same on all ranks of shard.group, got {_shown(field, values[0])} on rank 0 "
                    f"and {_shown(field, value)} on rank {rank}"
                )
    _check_layout(everyone)
    if len({terms.hash for terms in everyone}) > 1:
        raise ValueError(_differing_targets(shard, target))
    check_targets(as_rows(target), shard.vocab)
    return max(terms.row_bytes for terms in everyone)


def _exchanged(shard: VocabShard, own: Terms, device: torch.device) -> list[Terms]:
    sent = torch.tensor(own, dtype=torch.int64, device=device)
    return [Terms(*row) for row in all_gather(sent, shard.ranks).tolist()]


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
