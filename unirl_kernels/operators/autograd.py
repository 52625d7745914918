"""Autograd functions of the operators on rows of logits: their only gradient formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from unirl_kernels.backends.groups import (
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowStats,
)
from unirl_kernels.operators import rows
from unirl_kernels.operators.declare import flat
from unirl_kernels.operators.shards import Operators, ShardArgs, measured

Result = TypeVar("Result")


def refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "unirl_kernels gradients cannot be differentiated again: call backward without create_graph=True"
        )


def has_tangent(x: Tensor | None) -> bool:
    """Whether a tensor has a tangent of forward-mode AD. Inside the forward of an autograd function none has."""
    if x is None or torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """Raise if a tangent of forward-mode AD would be dropped."""
    if any(map(has_tangent, inputs)):
        raise NotImplementedError("unirl_kernels has no forward-mode gradient (torch.func.jvp): use backward")


_is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)


def scaled(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """gradient * factor. In place, unless the graph is kept for another backward that needs the gradient again."""
    refuse_double_backward()
    traced = type(gradient) is not Tensor or torch.compiler.is_compiling()
    # A batch of upstream gradients (is_grads_batched) is one tensor, which only PyTorch's operators know.
    if traced or _is_batched(factor) or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    rows.scale_(gradient, factor, backend)
    return gradient


def refuse_cached_logits() -> None:
    """Raise under selective activation checkpointing: it keeps the memory of matmuls' results for the backward, and
    does not notice that the logits are overwritten there."""
    if torch.compiler.is_compiling():
        return
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if any(type(mode).__name__ == "_CachingTorchDispatchMode" for mode in modes):
        raise RuntimeError(
            "overwrite_logits=True must not be used inside of selective activation checkpointing, which may keep the "
            "logits: set it to False, or compute the loss outside"
        )


def of_stats(d_logp: Tensor | None, d_entropy: Tensor | None, d_lse: Tensor | None) -> RowGradients:
    """Gradients of statistics in the form that kernels take."""
    return RowGradients(*(None if g is None else g.contiguous() for g in (d_logp, d_entropy, d_lse)))


def as_3d(logits: Tensor) -> Tensor:
    """[B, L, V] of either layout."""
    return logits if logits.dim() == 3 else logits.unsqueeze(0)


def overwrite(logits: Tensor, write: Callable[[Tensor], Result]) -> Result:
    """Call ``write`` to put a gradient into the memory of the logits. The logits, and the tensor that they are a view
    of, become empty, so that using them fails instead of reading a gradient.

    If ``write`` raises, which it does before it writes, they get their memory back. If it is interrupted, they stay
    empty, since it may have written.
    """
    # .data, so that the gradient does not share the version counter of the logits, which is incremented below.
    memory = logits.data
    if torch.compiler.is_compiling():
        result = write(memory)
    else:
        owners = [(x, x.data) for x in (logits, logits._base) if x is not None]
        for x, _ in owners:
            x.data = x.new_empty(0)
        try:
            result = write(memory)
        except Exception:
            for x, data in owners:
                x.data = data
            raise
    torch.autograd.graph.increment_version(logits)
    return result


def save_statistics(
    ctx: Any, found: Measured | Observed, readout: ReadoutArgs, inputs: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Save what the backward needs, and return the results of an autograd function of statistics.

    The backward uses the moments, not the results: users may change the results in place.
    """
    stats, moments, *observed = found
    others = flat(observed)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, readout.row_temperature, *moments)
    ctx.readout = readout._replace(row_temperature=None)
    return *stats, *others


class Statistics(torch.autograd.Function):
    """logp, entropy, lse of rows, and observations if the operator computes them; these have no gradient.

    With a shard the statistics are those of whole rows: one exchange in the forward, none in the backward.
    """

    @staticmethod
    def without_gradient(
        logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str, operators: Operators
    ) -> tuple[Tensor, ...]:
        """The same as ``apply`` without a gradient, with less host time."""
        refuse_forward_mode(logits)
        stats, _, *observed = measured(operators, as_3d(logits), target, readout, backend, None)
        return *stats, *flat(observed)

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        backend: str,
        operators: Operators,
        overwrites: bool,
        shard: ShardArgs | None,
    ) -> tuple[Tensor, ...]:
        refuse_forward_mode(logits)
        used = as_3d(logits) if shard is None else as_3d(logits)[..., : shard.columns]
        found = measured(operators, used, target, readout, backend, shard)
        ctx.backend, ctx.overwrites, ctx.shard = backend, overwrites, shard
        return save_statistics(ctx, found, readout, (logits, target))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        logits, target, row_temperature, *moments = saved_rows(ctx)
        shard, readout = ctx.shard, ctx.readout._replace(row_temperature=row_temperature)
        at, columns = (target, logits.shape[-1]) if shard is None else (shard.target(target), shard.columns)
        arguments = (at, readout, RowMoments(*moments), of_stats(*gradients[:3]), columns, ctx.backend)
        if not ctx.overwrites:
            d_logits = rows.token_stats_backward(as_3d(logits), *arguments).view(logits.shape)
            return d_logits, None, None, None, None, None, None

        def write(memory: Tensor) -> Tensor:
            rows.token_stats_backward_(as_3d(memory), *arguments)
            return memory

        d_logits = overwrite(logits, write)
        return d_logits, None, None, None, None, None, None


def saved_rows(ctx: Any) -> tuple[Any, ...]:
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "logits, target or temperature have changed since the forward: overwrite_logits=True wrote their gradient "
            "there (it allows one use of the logits and one backward), or another operation changed one in place"
        ) from error


class OnePass(torch.autograd.Function):
    """Loss, logp, entropy, lse of ``fused_loss``. The forward computes the gradient in the same pass. The backward
    may scale it in place: only a hook of saved tensors could hold it, too."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        program: ProgramArgs,
        backend: str,
        kernel: str,
        overwrites: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        refuse_forward_mode(logits)
        arguments = (target, readout, program, backend, kernel)
        if overwrites:
            refuse_cached_logits()

            def write(memory: Tensor) -> tuple[Tensor, RowStats, Tensor]:
                return *rows.fused_loss_(as_3d(memory), *arguments), memory

            loss, stats, d_logits = overwrite(logits, write)
        else:
            loss, stats, d_logits = rows.fused_loss(as_3d(logits), *arguments)
            d_logits = d_logits.view(logits.shape)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_logits)
        ctx.backend, ctx.overwrites, ctx.used = backend, overwrites, False
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        (d_logits,) = ctx.saved_tensors
        if ctx.overwrites and not torch.compiler.is_compiling():
            if ctx.used:
                raise RuntimeError("overwrite_logits=True allows one backward: its gradient took the logits' memory")
            ctx.used = True
        d_logits = None if d_loss is None else scaled(d_logits, d_loss, ctx.backend)
        return d_logits, None, None, None, None, None, None
