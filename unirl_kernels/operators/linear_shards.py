"""Statistics of rows of a linear head whose weight is split over a process group, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import ReadoutArgs, RowMoments
from unirl_kernels.operators import linear
from unirl_kernels.operators.autograd import of_stats, refuse_double_backward
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted
from unirl_kernels.operators.linear_autograd import handed_on, save_head
from unirl_kernels.operators.shards import ShardArgs, merged, merged_observations, no_columns


class SplitLinearStatistics(torch.autograd.Function):
    """``LinearStatistics`` of a shard of the weight. The gradient of hidden is this rank's part of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        readout: ReadoutArgs,
        sweep: SweepArgs,
        shard: ShardArgs,
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        if shard.columns:
            part = linear.linear_shard_moments(head, shard.target(target), readout, sweep)
        else:
            part = no_columns(target, sweep.dtype).moments
        stats, moments = merged(part, target, readout, shard)
        save_head(ctx, head, target, readout, moments, sweep)
        ctx.shard = shard
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradient(ctx, *gradients), None, None, None, None


class SplitLinearObservations(torch.autograd.Function):
    """``SplitLinearStatistics``, and the observations, which have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        readout: ReadoutArgs,
        sweep: SweepArgs,
        shard: ShardArgs,
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        if shard.columns:
            part = linear.linear_shard_observations(head, shard.target(target), readout, sweep)
        else:
            part = no_columns(target, sweep.dtype)
        stats, moments, observations = merged_observations(part, target, readout, shard)
        save_head(ctx, head, target, readout, moments, sweep)
        ctx.shard = shard
        ctx.mark_non_differentiable(*observations)
        return *stats, *observations

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        return *_gradient(ctx, d_logp, d_entropy, d_lse), None, None, None, None


def _gradient(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None) -> list[Tensor | None]:
    refuse_double_backward()
    hidden, weight, bias, target, row_temperature, *moments = ctx.saved_tensors
    head, shard = HeadArgs(hidden, weight, bias), ctx.shard
    if shard.columns:
        gradients: HeadGradients = linear.linear_shard_stats_backward(
            head,
            shard.target(target),
            ctx.readout._replace(row_temperature=row_temperature),
            RowMoments(*moments),
            of_stats(d_logp, d_entropy, d_lse),
            ctx.sweep,
            Wanted(*ctx.needs_input_grad[:3]),
        )
    else:
        gradients = HeadGradients(*(weight.new_zeros(0) if x is None else torch.zeros_like(x) for x in head))
    return handed_on(ctx, gradients, [None if x is None else x.dtype for x in head])
