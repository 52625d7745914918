"""Statistics of rows that are split over a process group, and their gradient. No operator communicates: each works on
the columns of this rank, and what follows from the whole row is made here, of the moments that the ranks exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import (
    Measured,
    Observed,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowObservations,
    RowStats,
    load,
)
from unirl_kernels.backends.moments import kappa_of, merge, merge_observations, statistics, target_in
from unirl_kernels.batch import IGNORE
from unirl_kernels.collectives import Group, all_gather
from unirl_kernels.operators import rows
from unirl_kernels.operators.autograd import (
    as_rows,
    of_stats,
    overwrite,
    refuse_double_backward,
    save_rows,
    saved_rows,
)
from unirl_kernels.operators.declare import operator


class ShardArgs(NamedTuple):
    """A shard of a vocabulary as autograd functions take it."""

    start: int
    columns: int  # without padding
    vocab: int
    ranks: Group
    same_targets: bool  # whether it is known that all ranks have the same

    def target(self, target: Tensor) -> Tensor:
        """Targets as this shard has them."""
        return target_in(target, range(self.start, self.start + self.columns), self.vocab)


def _fake_backward(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    columns: int,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operator(fake=_fake_backward)
def shard_stats_backward(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    columns: int,
    backend: str,
) -> Tensor:
    """``token_stats_backward`` of the first columns; the gradient of the others, which are padding, is 0."""
    kernels = load(backend)
    d_logits = kernels.empty(logits.shape, logits.dtype, logits.device)
    if columns:
        used = d_logits[..., :columns]
        kernels.token_stats_backward(logits[..., :columns], target, readout, moments, gradients, used)
    d_logits[..., columns:] = 0
    return d_logits


def exchanged(part: Sequence[Tensor], target: Tensor, shard: ShardArgs) -> list[Tensor]:
    """[n, B, L] for each of the values [B, L] that this rank has of its rows: those of all ranks, by one all-gather.

    Where it is not known that the ranks have the same targets, a hash of them (8 bytes) goes with the values, which are
    NaN if it differs.
    """
    values = torch.stack(tuple(part))
    if shard.same_targets:
        return list(all_gather(values, shard.ranks).unbind(1))
    bits = torch.int64 if values.dtype == torch.float64 else torch.int32
    own = target_hash(target).reshape(1).view(bits)
    found = all_gather(torch.cat([values.reshape(-1).view(bits), own]), shard.ranks)
    hashes = found[:, -own.numel() :]
    gathered = found[:, : -own.numel()].contiguous().view(values.dtype).view(shard.ranks.size, *values.shape)
    return list(torch.where((hashes == hashes[:1]).all(), gathered, torch.nan).unbind(1))


def target_hash(target: Tensor) -> Tensor:
    """[] int64: a number that differs, all but certainly, where targets or their order differ."""
    flat = target.reshape(-1)
    positions = torch.arange(flat.numel(), device=flat.device)
    mixed = (flat + 1 + positions * -7046029254386353131) * -4417276706812531889
    return ((mixed ^ (mixed >> 29)) * -7723592293110705685).sum()


def merged(part: RowMoments, target: Tensor, readout: ReadoutArgs, shard: ShardArgs) -> Measured:
    """Statistics and moments of whole rows, from the moments of this rank's columns."""
    kappa = kappa_of(readout, part.top)
    moments = merge(RowMoments(*exchanged(part, target, shard)), kappa)
    return Measured(_used(RowStats, statistics(moments, kappa), target), moments)


def merged_observations(part: Observed, target: Tensor, readout: ReadoutArgs, shard: ShardArgs) -> Observed:
    """``merged``, and the observations of whole rows."""
    own, dtype = part.observations, part.moments.top.dtype
    sent = own._replace(
        mean_logit=own.mean_logit * (shard.columns / shard.vocab),
        argmax=(own.argmax + shard.start).to(dtype),  # exact: no vocabulary has 2^24 columns
    )
    found = exchanged((*part.moments, *sent), target, shard)
    of_shards, seen = RowMoments(*found[:4]), RowObservations(*found[4:])
    kappa = kappa_of(readout, part.moments.top)
    moments = merge(of_shards, kappa)
    seen = seen._replace(argmax=seen.argmax.nan_to_num(-1).to(torch.int64))
    of_rows = merge_observations(seen, of_shards, moments, kappa)
    known = (target >= 0) & (target < shard.vocab)
    observations = _used(RowObservations, of_rows, target)._replace(argmax=torch.where(known, of_rows.argmax, -1))
    return Observed(_used(RowStats, statistics(moments, kappa), target), moments, observations)


def _used(group: Any, values: Sequence[Tensor], target: Tensor) -> Any:
    return group(*(x.masked_fill(target == IGNORE, 0) for x in values))


def no_columns(target: Tensor, dtype: torch.dtype) -> Observed:
    """What a shard without columns finds: nothing."""

    def full(value: float) -> Tensor:
        return rows.row_like(target, dtype).fill_(value)

    stats = RowStats(full(-torch.inf), full(0), full(-torch.inf))
    moments = RowMoments(full(-torch.inf), full(-1), full(0), full(-torch.inf))
    observations = RowObservations(full(-torch.inf), full(0), full(-torch.inf), torch.zeros_like(target))
    return Observed(stats, moments, observations)


class SplitStatistics(torch.autograd.Function):
    """``Statistics`` of rows of which this rank has a shard: one all-gather in the forward, none in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        shard: ShardArgs,
        backend: str,
        overwrites: bool,
    ) -> tuple[Tensor, ...]:
        if shard.columns:
            used = as_rows(logits)[..., : shard.columns]
            part = rows.token_stats(used, shard.target(target), readout, backend).moments
        else:
            part = no_columns(target, logits.dtype).moments
        stats, moments = merged(part, target, readout, shard)
        save_rows(ctx, logits, target, readout, moments, backend, overwrites)
        ctx.shard = shard
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, of_stats(*gradients)), None, None, None, None, None


class SplitObservations(torch.autograd.Function):
    """``Observations`` of rows of which this rank has a shard."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        shard: ShardArgs,
        backend: str,
        overwrites: bool,
    ) -> tuple[Tensor, ...]:
        if shard.columns:
            used = as_rows(logits)[..., : shard.columns]
            part = rows.token_observations(used, shard.target(target), readout, backend)
        else:
            part = no_columns(target, logits.dtype)
        stats, moments, observations = merged_observations(part, target, readout, shard)
        save_rows(ctx, logits, target, readout, moments, backend, overwrites)
        ctx.shard = shard
        ctx.mark_non_differentiable(*observations)
        return *stats, *observations

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, of_stats(d_logp, d_entropy, d_lse)), None, None, None, None, None


def _gradient(ctx: Any, gradients: RowGradients) -> Tensor:
    refuse_double_backward()
    logits, target, row_temperature, *moments = saved_rows(ctx)
    readout = ctx.readout._replace(row_temperature=row_temperature)
    arguments = (ctx.shard.target(target), readout, RowMoments(*moments), gradients)
    if not ctx.overwrites:
        d_logits: Tensor = shard_stats_backward(as_rows(logits), *arguments, ctx.shard.columns, ctx.backend)
        return d_logits.view(logits.shape)

    def write(memory: Tensor) -> Tensor:
        used = as_rows(memory)
        if ctx.shard.columns:
            rows.token_stats_backward_(used[..., : ctx.shard.columns], *arguments, ctx.backend)
        used[..., ctx.shard.columns :] = 0
        return memory

    return overwrite(logits, write)
