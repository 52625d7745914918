"""Autograd functions of the operators on linear heads: their only gradient formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends.groups import ProgramArgs, ReadoutArgs, RowMoments
from unirl_kernels.operators import linear
from unirl_kernels.operators.autograd import (
    of_stats,
    refuse_double_backward,
    refuse_forward_mode,
    save_statistics,
    scaled,
)
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted
from unirl_kernels.operators.shards import Operators, ShardArgs, measured


class LinearStatistics(torch.autograd.Function):
    """logp, entropy, lse of a head, and observations if the operator computes them; these have no gradient.

    The backward computes the logits again. With a shard of the weight, the statistics are those of the whole
    vocabulary, and the gradient of hidden is this rank's part of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        readout: ReadoutArgs,
        sweep: SweepArgs,
        operators: Operators,
        shard: ShardArgs | None,
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        refuse_forward_mode(*head)
        found = measured(operators, head, target, readout, sweep, shard)
        ctx.sweep, ctx.shard = sweep, shard
        return save_statistics(ctx, found, readout, (*head, target))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, bias, target, row_temperature, *moments = ctx.saved_tensors
        head, readout = HeadArgs(hidden, weight, bias), ctx.readout._replace(row_temperature=row_temperature)
        arguments = (readout, RowMoments(*moments), of_stats(*gradients[:3]), ctx.sweep)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        if ctx.shard is None:
            found = linear.linear_token_stats_backward(head, target, *arguments, wanted)
        elif ctx.shard.columns:
            found = linear.linear_shard_stats_backward(head, ctx.shard.target(target), *arguments, wanted)
        else:
            found = HeadGradients(*(weight.new_zeros(0) if x is None else torch.zeros_like(x) for x in head))
        dtypes = [None if x is None else x.dtype for x in head]
        return *handed_on(ctx, found, dtypes), None, None, None, None, None


class OnePassLinear(torch.autograd.Function):
    """Loss, logp, entropy, lse of ``fused_linear_loss``. The forward computes the gradients in the same pass. The
    backward may scale them in place: only a hook of saved tensors could hold them, too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        readout: ReadoutArgs,
        program: ProgramArgs,
        kernel: str,
        sweep: SweepArgs,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        loss, stats, gradients = linear.fused_linear_loss(head, target, readout, program, kernel, sweep, wanted)
        keep(ctx, head, gradients, sweep.backend)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, d_loss), None, None, None, None, None, None


def keep(ctx: Any, head: HeadArgs, gradients: Sequence[Tensor], backend: str) -> None:
    """Save gradients of hidden, weight and bias that the forward has computed."""
    refuse_forward_mode(*head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes, ctx.backend = [None if x is None else x.dtype for x in head], backend


def scaled_gradients(ctx: Any, d_loss: Tensor | None) -> list[Tensor | None]:
    """The saved gradients of hidden, weight and bias, times the upstream one."""
    if d_loss is None:
        return [None, None, None]
    wanted = ctx.needs_input_grad[:3]
    found = [scaled(x, d_loss, ctx.backend) if w else x for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
    return handed_on(ctx, found, ctx.dtypes)


def handed_on(ctx: Any, gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias for autograd: only the wanted ones, in the dtype of their input."""
    found = zip(gradients, dtypes, ctx.needs_input_grad[:3], strict=True)
    return [x.to(dtype) if dtype is not None and wanted else None for x, dtype, wanted in found]
