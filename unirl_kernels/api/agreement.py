"""The ranks of a split vocabulary compare their arguments before the work starts, so that no rank waits for one that
makes another call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from unirl_kernels.api.arguments import Given
from unirl_kernels.api.described import compared_lines, hash_of, shown_lines
from unirl_kernels.api.rows import per_row
from unirl_kernels.checks import has_values
from unirl_kernels.operators.rows import check_targets
from unirl_kernels.operators.shards import ShardArgs, Tiles, target_hash
from unirl_kernels.ranks.collectives import all_gather, all_texts
from unirl_kernels.ranks.shard import VocabShard

Result = TypeVar("Result")


class Brought(NamedTuple):
    """A rank's own values that the exchange needs."""

    columns: int  # of its logits, or rows of its weight, padding included
    row_bytes: int = 0  # memory for the logits of one token of a linear head
    wants: int = 0  # which gradients of a linear head
    max_chunk_bytes: int | None = None


OWN = ("refused", "start", "columns", "row_bytes")
"""Numbers that may differ between ranks. The first says whether the rank refuses its own arguments."""

NUMBERS = {
    "vocab": "shard.vocab",
    "tiles": "shard.tiles",
    "dims": "target.dim()",
    "first": "target.shape[0]",
    "last": "target.shape[-1]",
    "max_chunk_bytes": "plan.max_chunk_bytes",
    "wants": "what requires a gradient (1: hidden, 2: weight, 4: bias, added up)",
}
"""Numbers that are compared directly."""

NONE = {"max_chunk_bytes": -1, "tiles": 0}
"""Sent instead of None."""

ARGUMENTS = {
    "call": "the function that is called",
    "operand": "the input",
    "hidden": "shard.hidden",
    "readout": "readout",
    "batch": "batch",
    "loss": "loss",
}
"""Arguments that are compared by a hash, and shown as text if the hashes differ."""

EXCHANGED = (*OWN, *NUMBERS, *ARGUMENTS, "targets")
Terms = dict[str, int]
"""What a rank sends: a number for each of ``EXCHANGED``, 0 if it has none. ``targets`` is a hash."""

_known: set[tuple[VocabShard, tuple[int, ...]]] = set()
"""What was already compared on accelerators."""


def agreed(
    shard: VocabShard,
    operand: object,
    given: Given,
    own: Mapping[str, object],
    check: Callable[[], tuple[Result, Brought]],
    *,
    waits: bool = False,
) -> tuple[Result, ShardArgs, int]:
    """The result of ``check``, this rank's shard for operators, and the largest ``row_bytes``.

    On a CPU, ranks compare in each call. A cache would be unsafe: if one rank skips the exchange and another does not,
    the exchanges have different sizes, which with gloo gives garbage or ends the process. On an accelerator, comparing
    waits for the device, so what was compared is cached, without numbers, which change from step to step. A rank that
    then refuses its arguments leaves the others waiting. Targets are compared by their hash in the exchange that
    follows. Compiled code compares only the targets.

    Args:
        shard: the shard.
        operand: logits or hidden states; a refusal is sent from its device.
        given: arguments that must be the same on all ranks.
        own: further values that must be the same, by the names of ``ARGUMENTS``.
        check: checks this rank's arguments, and raises if it refuses them.
        waits: whether the call waits for the device anyway.

    Raises:
        RuntimeError: when another rank refuses its arguments.
        ValueError: when the ranks do not agree, on every rank, naming a rank and its value.
        IndexError: when a target is outside the vocabulary.
    """
    target = given.target
    if torch.compiler.is_compiling() or (isinstance(target, Tensor) and not has_values(target)):
        result, brought = check()
        return result, _args(shard, brought.columns, same_targets=False), brought.row_bytes
    call = f"{given.operators.whole.name} {'without' if given.of_loss is None else 'for'} a loss"
    arguments = {"call": call, "readout": given.readout, **own}
    if given.of_loss is not None:
        arguments |= zip(("batch", "loss"), given.of_loss, strict=True)
    try:
        result, brought = check()
        values = waits or not reading_waits(target)
        hashes = {name: hash_of(compared_lines(value, values)) for name, value in arguments.items()}
        terms = _terms(shard, brought, target) | hashes
    except Exception:
        device = next((x.device for x in (operand, target) if isinstance(x, Tensor)), torch.device("cpu"))
        _exchanged(shard, {"refused": 1}, device)
        raise
    row_bytes = brought.row_bytes
    if values:
        row_bytes = _compared(shard, terms | {"targets": int(target_hash(target))}, target, arguments)
    elif (key := (shard, tuple(terms.values()))) not in _known:
        _compared(shard, terms, target, arguments)
        _known.add(key)
    return result, _args(shard, brought.columns, same_targets=values), row_bytes


def _terms(shard: VocabShard, own: Brought, target: Tensor) -> Terms:
    sizes = {"dims": target.dim(), "first": target.shape[0], "last": target.shape[-1]}
    of_shard = {"start": shard.start, "vocab": shard.vocab, "tiles": shard.tiles}
    numbers: dict[str, int | None] = {**of_shard, **own._asdict(), **sizes}
    return {name: NONE[name] if number is None else number for name, number in numbers.items()}


def reading_waits(target: Tensor) -> bool:
    """Whether reading the values of a tensor waits for a device."""
    return target.device.type != "cpu"


def _args(shard: VocabShard, columns: int, same_targets: bool) -> ShardArgs:
    tiles = Tiles(shard.tile, shard.slots)
    return ShardArgs(shard.start, shard.used(columns), shard.vocab, shard.ranks, same_targets, tiles)


def _compared(shard: VocabShard, own: Terms, target: Tensor, arguments: Mapping[str, object]) -> int:
    """Compare the ranks' terms; return the largest ``row_bytes``."""
    everyone = _exchanged(shard, own, target.device)
    for rank, terms in enumerate(everyone):
        if terms["refused"]:
            raise RuntimeError(f"shard: rank {rank} of its group refuses its arguments; its error says why")
    _check_told(shard, everyone, "call", target.device, arguments)
    for name, told in NUMBERS.items():
        if (other := _other(everyone, name)) is not None:
            here, there = (_shown(name, everyone[k][name]) for k in (0, other))
            raise _differing(told, here, there, other)
    _check_layout(everyone)
    for name in ARGUMENTS:
        _check_told(shard, everyone, name, target.device, arguments)
    if _other(everyone, "targets") is not None:
        raise _differing_targets(shard, target)
    check_targets(per_row(target), shard.vocab)
    return max(terms["row_bytes"] for terms in everyone)


def _exchanged(shard: VocabShard, own: Terms, device: torch.device) -> list[Terms]:
    sent = torch.tensor([own.get(name, 0) for name in EXCHANGED], dtype=torch.int64, device=device)
    return [dict(zip(EXCHANGED, row, strict=True)) for row in all_gather(sent, shard.ranks).tolist()]


def _other(everyone: Sequence[Terms], name: str) -> int | None:
    """The first rank whose number differs from that of rank 0."""
    return next((rank for rank, terms in enumerate(everyone) if terms[name] != everyone[0][name]), None)


def _differing(name: str, here: object, there: object, rank: int, at: str = "") -> ValueError:
    return ValueError(
        f"{name} must be the same on all ranks of shard.group, got {here} on rank 0 and {there} on rank {rank}{at}"
    )


def _check_told(
    shard: VocabShard, everyone: Sequence[Terms], name: str, device: torch.device, arguments: Mapping[str, object]
) -> None:
    """Raise a ``ValueError`` if an argument differs. The ranks then exchange it as text."""
    rank = _other(everyone, name)
    if rank is None:
        return
    own = shown_lines(arguments[name], values=True) if name in arguments else ["nothing"]
    texts = [text.split("\n") for text in all_texts("\n".join(own), shard.ranks, device)]
    for here, there in zip_longest(texts[0], texts[rank], fillvalue="nothing"):
        if here != there:
            break
    raise _differing(ARGUMENTS[name], here.lstrip("=."), there.lstrip("=."), rank)


def _shown(name: str, number: int) -> str:
    return "None" if NONE.get(name) == number else str(number)


def _check_layout(everyone: Sequence[Terms]) -> None:
    """Raise a ``ValueError`` unless the shards follow one another and hold the whole vocabulary."""
    end = 0
    for rank, terms in enumerate(everyone):
        if terms["start"] != end:
            before = f", where the {everyone[rank - 1]['columns']} columns of rank {rank - 1} end" if rank else ""
            raise ValueError(f"shard.start must be {end} on rank {rank}{before}, got {terms['start']}")
        end += terms["columns"]
    vocab = everyone[0]["vocab"]
    if end < vocab:
        raise ValueError(f"the shards must hold all {vocab} columns of shard.vocab, got {end} on {len(everyone)} ranks")


def _differing_targets(shard: VocabShard, target: Tensor) -> ValueError:
    """The error for the first position where a rank's target differs from that of rank 0."""
    everyone = all_gather(target, shard.ranks)
    rank, *at = (everyone != everyone[:1]).nonzero()[0].tolist()
    return _differing("target", int(everyone[(0, *at)]), int(everyone[(rank, *at)]), rank, f" at {tuple(at)}")
