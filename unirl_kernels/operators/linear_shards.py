"""Statistics of rows of a linear head whose weight is split over a process group, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import Observed, ReadoutArgs, RowMoments
from unirl_kernels.operators import linear
from unirl_kernels.operators.autograd import of_stats, refuse_double_backward, refuse_forward_mode
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted
from unirl_kernels.operators.linear_autograd import handed_on
from unirl_kernels.operators.rows import observed_like
from unirl_kernels.operators.shards import ShardArgs, Tiles, merged, tiles_like


def _moments(head: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, sweep: SweepArgs) -> RowMoments:
    return tiles_like(target, sweep.dtype, tiles)


def _observations(head: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, sweep: SweepArgs) -> Observed:
    return observed_like(target, sweep.dtype)


# A target may be ELSEWHERE. Rows are measured in the chunks of the backward, which so goes by moments of the same bits.
linear_shard_moments = Operator("linear_shard_moments", _moments, _moments)
linear_shard_observations = Operator("linear_shard_observations", _observations, _observations)
linear_shard_stats_backward = Operator("linear_shard_stats_backward", linear.backward, linear.backward)


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
        operator: Operator,
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        refuse_forward_mode(*head)
        part = operator(head, shard.target(target), readout, shard.tiles, sweep)
        stats, moments, others = merged(part, target, readout, shard)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*head, target, readout.row_temperature, *moments)
        ctx.readout, ctx.sweep, ctx.shard = readout._replace(row_temperature=None), sweep, shard
        return *stats, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, bias, target, row_temperature, *moments = ctx.saved_tensors
        head, readout = HeadArgs(hidden, weight, bias), ctx.readout._replace(row_temperature=row_temperature)
        if ctx.shard.columns:
            of_rows, d_stats = RowMoments(*moments), of_stats(*gradients[:3])
            wanted, at = Wanted(*ctx.needs_input_grad[:3]), ctx.shard.target(target)
            found = linear_shard_stats_backward(head, at, readout, of_rows, d_stats, ctx.sweep, wanted)
        else:
            found = HeadGradients(*(weight.new_zeros(0) if x is None else torch.zeros_like(x) for x in head))
        dtypes = [None if x is None else x.dtype for x in head]
        return *handed_on(ctx, found, dtypes), None, None, None, None, None
