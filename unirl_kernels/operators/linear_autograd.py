"""Gradients of operators on linear heads. The only autograd formulas that these operators have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import ProgramArgs, ReadoutArgs, RowMoments
from unirl_kernels.operators import linear
from unirl_kernels.operators.autograd import of_stats, refuse_double_backward, refuse_forward_mode, scaled
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.linear import HeadArgs, SweepArgs, Wanted


class LinearStatistics(torch.autograd.Function):
    """logp, entropy, lse of ``linear_token_stats`` or ``linear_token_observations``, and the observations, which have
    no gradient. The backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        readout: ReadoutArgs,
        sweep: SweepArgs,
        operator: Operator,
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        refuse_forward_mode(*head)
        stats, moments, *observations = operator(head, target, readout, sweep)
        others = [x for group in observations for x in group]
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*head, target, readout.row_temperature, *moments)
        ctx.readout, ctx.sweep = readout._replace(row_temperature=None), sweep
        return *stats, *others

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        hidden, weight, bias, target, row_temperature, *moments = ctx.saved_tensors
        head, readout = HeadArgs(hidden, weight, bias), ctx.readout._replace(row_temperature=row_temperature)
        of_rows, d_stats = RowMoments(*moments), of_stats(*gradients[:3])
        wanted = Wanted(*ctx.needs_input_grad[:3])
        found = linear.linear_token_stats_backward(head, target, readout, of_rows, d_stats, ctx.sweep, wanted)
        return *handed_on(ctx, found, [None if x is None else x.dtype for x in head]), None, None, None, None


class OnePassLinear(torch.autograd.Function):
    """Loss, logp, entropy, lse of ``fused_linear_loss``, whose gradients were made in the same pass. It keeps them to
    itself, and so may scale them in place."""

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
    """Save gradients of hidden, weight and bias that the forward has made."""
    refuse_forward_mode(*head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes, ctx.backend = [None if x is None else x.dtype for x in head], backend


def scaled_gradients(ctx: Any, d_loss: Tensor | None) -> list[Tensor | None]:
    """The saved gradients of hidden, weight and bias, times the upstream one."""
    if d_loss is None:
        return [None, None, None]
    return handed_on(ctx, [scaled(x, d_loss, ctx.backend) for x in ctx.saved_tensors], ctx.dtypes)


def handed_on(ctx: Any, gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias as autograd wants them: those asked for, in their input's dtype."""
    found = zip(gradients, dtypes, ctx.needs_input_grad[:3], strict=True)
    return [x.to(dtype) if dtype is not None and wanted else None for x, dtype, wanted in found]
