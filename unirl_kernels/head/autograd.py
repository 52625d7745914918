"""Autograd of linear heads: gradients made in the forward, handed on in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unirl_kernels import ops
from unirl_kernels.head.composed import Composition, composed
from unirl_kernels.head.operators import LIBRARY


class OnePassLinear(torch.autograd.Function):
    """``unirl::fused_linear_loss``. Unlike the operator's own autograd it keeps the gradients to itself, and so may
    scale them in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, logp, entropy, *gradients = torch.ops.unirl.fused_linear_loss(hidden, weight, bias, *args)
        _keep(ctx, (hidden, weight, bias), gradients, backend=args[11])
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return _hand_on(ctx, d_loss)


class ComposedLinear(torch.autograd.Function):
    """``composed``, with its gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, composition: Composition
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, logp, entropy, gradients = composed(hidden, weight, bias, composition, ctx.needs_input_grad[:3])
        _keep(ctx, (hidden, weight, bias), gradients, composition.backend)
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return _hand_on(ctx, d_loss)


def _keep(ctx: Any, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor], backend: str) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.dtypes, ctx.backend = [None if x is None else x.dtype for x in inputs], backend


def _hand_on(ctx: Any, d_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return _for_inputs(ctx, (None,) * 3)
    return _for_inputs(ctx, [ops.scaled(x, d_loss, ctx.backend) for x in ctx.saved_tensors])


def _for_inputs(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias as autograd wants them: those asked for, and None for the rest."""
    found = zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    handed = (x.to(dtype) if x is not None and wanted else None for x, dtype, wanted in found)
    return *handed, *[None] * (len(ctx.needs_input_grad) - 3)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs[:3], output[3:], backend=inputs[14])


def _loss_gradient(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    ops.refuse_double_backward()
    return _for_inputs(ctx, [None if d_loss is None else x * d_loss for x in ctx.saved_tensors])


torch.library.register_autograd("unirl::fused_linear_loss", _loss_gradient, setup_context=_save_loss, lib=LIBRARY)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, *scalars, row_temperature, backend, dtype, max_chunk_bytes = inputs
    ctx.mark_non_differentiable(*output[ops.N_STATS :])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, *output[: ops.N_STATS], row_temperature)
    ctx.scalars, ctx.how = scalars, (backend, dtype, max_chunk_bytes)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]


def _stats_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    ops.refuse_double_backward()
    *tensors, row_temperature = ctx.saved_tensors
    args = (*tensors, *ops.of_stats(gradients), *ctx.scalars, row_temperature, *ctx.how, list(ctx.needs_input_grad[:3]))
    return _for_inputs(ctx, torch.ops.unirl.linear_token_stats_backward(*args))


for _name in ("linear_token_stats", "linear_token_observations"):
    torch.library.register_autograd(f"unirl::{_name}", _stats_gradient, setup_context=_save_stats, lib=LIBRARY)
