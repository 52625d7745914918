"""Statistics of rows, whole or split over a process group. No operator communicates: each works on the columns of this
rank, and what follows from the whole row is made here, of the moments that the ranks exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import load
from unirl_kernels.backends.groups import (
    ELSEWHERE,
    Measure,
    Measured,
    Observed,
    ReadoutArgs,
    RowMoments,
    RowObservations,
    RowStats,
    measured_like,
    observed_like,
    rows_like,
)
from unirl_kernels.backends.moments import kappa_of, merge, merge_observations, placed, statistics, target_in
from unirl_kernels.batch import IGNORE
from unirl_kernels.operators import rows
from unirl_kernels.operators.declare import Operator, operator
from unirl_kernels.ranks.collectives import Group, all_gather


class Tiles(NamedTuple):
    """The tiles of a shard: columns per tile, and number of tiles."""

    columns: int
    slots: int


class ShardArgs(NamedTuple):
    """A shard of a vocabulary as autograd functions take it."""

    start: int
    columns: int  # without padding
    vocab: int
    ranks: Group
    same_targets: bool  # whether it was checked that all ranks have the same targets
    tiles: Tiles

    def target(self, target: Tensor) -> Tensor:
        """Targets for this shard's columns, see ``target_in``."""
        return target_in(target, range(self.start, self.start + self.columns), self.vocab)


@operator(fake=lambda logits, target, readout, tiles, backend: tiles_like(target, logits.dtype, tiles))
def shard_moments(logits: Tensor, target: Tensor, readout: ReadoutArgs, tiles: Tiles, backend: str) -> RowMoments:
    """[slots, B, L]: moments of a rank's columns, tile by tile. A target may be ELSEWHERE."""
    return moments_of_tiles(load(backend).token_stats, logits, target, readout, tiles)


@operator(fake=lambda logits, target, *_: observed_like(target, logits.dtype))
def shard_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs, tiles: Tiles, backend: str) -> Observed:
    """[B, L]: moments of all columns of a rank at once, and observations."""
    if not logits.shape[-1]:
        return no_columns(target, logits.dtype)
    return load(backend).token_observations(logits, target, readout)


class Operators(NamedTuple):
    """The operators for statistics or observations: of whole rows, and of rows of which a rank has a shard."""

    whole: Operator
    of_shard: Operator
    in_tiles: bool  # whether a shard may have more than one tile


ROW_STATISTICS = Operators(rows.token_stats, shard_moments, in_tiles=True)
ROW_OBSERVATIONS = Operators(rows.token_observations, shard_observations, in_tiles=False)


def measured(
    operators: Operators, operand: object, target: Tensor, readout: ReadoutArgs, how: object, shard: ShardArgs | None
) -> Measured | Observed:
    """Run the operators on logits or a head. With a shard, merge the results of all ranks."""
    if shard is None:
        return operators.whole(operand, target, readout, how)  # type: ignore[no-any-return]
    part = operators.of_shard(operand, shard.target(target), readout, shard.tiles, how)
    return merged(part, target, readout, shard)


def measured_chunk(
    measure: Measure, logits: Tensor, target: Tensor, readout: ReadoutArgs, shard: ShardArgs | None
) -> Measured | Observed:
    """Run a backend function on a chunk of logits. With a shard, merge the results of all ranks."""
    if shard is None:
        return measure(logits, target, readout)
    part = moments_of_tiles(measure, logits, shard.target(target), readout, shard.tiles)
    return merged(part, target, readout, shard)


def tiles_like(target: Tensor, dtype: torch.dtype, tiles: Tiles) -> RowMoments:
    """Uninitialised moments of rows, tile by tile."""
    return RowMoments._make(rows_like(target.new_empty(tiles.slots, *target.shape), dtype, 4))


def moments_of_tiles(
    measure: Measure, logits: Tensor, target: Tensor, readout: ReadoutArgs, tiles: Tiles
) -> RowMoments:
    """Moments of each tile of a shard, [slots, B, L]. The last tiles may have no columns."""
    width, found = logits.shape[-1], []
    for k in range(tiles.slots):
        columns = range(min(k * tiles.columns, width), min((k + 1) * tiles.columns, width))
        if not columns:
            found.append(no_columns(target, logits.dtype).moments)
            continue
        at = target
        if len(columns) < width:
            at = torch.where(target == ELSEWHERE, ELSEWHERE, target_in(target, columns, width))
        found.append(measure(logits[..., columns.start : columns.stop], at, readout).moments)
    return RowMoments(*map(torch.stack, zip(*found, strict=True)))


def exchanged(part: Sequence[Tensor], target: Tensor, shard: ShardArgs) -> list[Tensor]:
    """The values of all ranks by one all-gather: [n slots, B, L] for each of this rank's values [slots, B, L].

    If it was not checked that the ranks have the same targets, a hash of the targets (8 bytes) is sent with the values,
    and the results are NaN if the hashes differ.
    """
    values = torch.stack(tuple(part))
    if shard.same_targets:
        return _by_value(all_gather(values, shard.ranks))
    bits = torch.int64 if values.dtype == torch.float64 else torch.int32
    own = target_hash(target).reshape(1).view(bits)
    found = all_gather(torch.cat([values.reshape(-1).view(bits), own]), shard.ranks)
    hashes = found[:, -own.numel() :]
    gathered = found[:, : -own.numel()].contiguous().view(values.dtype).view(shard.ranks.size, *values.shape)
    return _by_value(torch.where((hashes == hashes[:1]).all(), gathered, torch.nan))


def _by_value(gathered: Tensor) -> list[Tensor]:
    """Split [n, values, slots, B, L] into a list of [n slots, B, L]."""
    return list(gathered.transpose(0, 1).flatten(1, 2).unbind(0))


def target_hash(target: Tensor) -> Tensor:
    """[] int64: a hash that almost certainly differs if the targets or their order differ."""
    flat = target.reshape(-1)
    positions = torch.arange(flat.numel(), device=flat.device)
    mixed = (flat + 1 + positions * -7046029254386353131) * -4417276706812531889
    return ((mixed ^ (mixed >> 29)) * -7723592293110705685).sum()


def merged(part: RowMoments | Observed, target: Tensor, readout: ReadoutArgs, shard: ShardArgs) -> Measured | Observed:
    """Statistics and moments of whole rows, and observations if the part has them.

    Args:
        part: of this rank's columns; moments are [slots, B, L], moments with observations [B, L].
        target: [B, L], of the whole vocabulary.
        readout: how logits become log-probabilities.
        shard: which columns.
    """
    if isinstance(part, RowMoments):
        own: list[Tensor] = list(part)
    else:
        seen = placed(part.observations, shard.start, shard.columns / shard.vocab)
        # A float has all of them: see check_split.
        seen = seen._replace(argmax=seen.argmax.to(seen.largest.dtype))
        own = [x.unsqueeze(0) for x in (*part.moments, *seen)]
    found = exchanged(own, target, shard)
    n = len(RowMoments._fields)
    of_shards = RowMoments(*found[:n])
    kappa = kappa_of(readout, of_shards.top)
    moments = merge(of_shards, kappa)
    stats = RowStats(*_used(statistics(moments, kappa), target))
    if isinstance(part, RowMoments):
        return Measured(stats, moments)
    seen = RowObservations(*found[n:])
    seen = seen._replace(argmax=seen.argmax.nan_to_num(-1).to(torch.int64))
    *values, argmax = merge_observations(seen, of_shards, moments, kappa)
    known = (target >= 0) & (target < shard.vocab)
    return Observed(stats, moments, RowObservations._make((*_used(values, target), torch.where(known, argmax, -1))))


def _used(values: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    return [x.masked_fill(target == IGNORE, 0) for x in values]


def no_columns(target: Tensor, dtype: torch.dtype) -> Observed:
    """The results of a shard without columns."""
    (like,) = rows_like(target, dtype, 1)

    def full(value: float) -> Tensor:
        return torch.full_like(like, value)

    moments = RowMoments(full(-torch.inf), full(-1), full(0), full(-torch.inf))
    observations = RowObservations(full(-torch.inf), full(0), full(-torch.inf), torch.zeros_like(target))
    return Observed(measured_like(target, dtype).stats, moments, observations)
