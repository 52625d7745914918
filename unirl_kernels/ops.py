"""The operators: schemas, shapes, autograd, and the dispatch to a backend. Registered as ``torch.ops.unirl.*``.

Logits are [B, L, V] here and per-row tensors [B, L]; the packed layout is B = 1. An operator names its backend and
kernel, which were chosen before; it never chooses and never falls back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import ReadoutArgs, RowFields, RowGradients, RowObservations, RowStats, load
from unirl_kernels.batch import IGNORE

_LIB = torch.library.Library("unirl", "DEF")
READOUT = "float scale, float? softcap, float temperature, Tensor? row_temperature"
FIELDS = "Tensor weight, Tensor? advantage, Tensor? old_logp, Tensor? ref_logp"
STATS = "Tensor logp, Tensor entropy, Tensor lse"
OBSERVATIONS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
GRADIENTS = "Tensor? d_logp, Tensor? d_entropy, Tensor? d_lse"
PROGRAM = "str program, Tensor params, str backend, str kernel"

_LIB.define(f"token_stats(Tensor logits, Tensor target, {READOUT}, str backend) -> (Tensor, Tensor, Tensor)")
_LIB.define(f"token_observations(Tensor logits, Tensor target, {READOUT}, str backend) -> {OBSERVATIONS}")
_LIB.define(
    f"token_stats_backward(Tensor logits, Tensor target, {STATS}, {GRADIENTS}, {READOUT}, str backend) -> Tensor"
)
_LIB.define(
    f"token_stats_backward_(Tensor(a!) logits, Tensor target, {STATS}, {GRADIENTS}, {READOUT}, str backend) -> ()"
)
_LIB.define(
    f"fused_loss(Tensor logits, Tensor target, {FIELDS}, {READOUT}, {PROGRAM}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define(
    f"fused_loss_(Tensor(a!) logits, Tensor target, {FIELDS}, {READOUT}, {PROGRAM}) -> (Tensor, Tensor, Tensor)"
)
_LIB.define("scale_(Tensor(a!) x, Tensor factor, str backend) -> ()")

OPERATORS = (
    "token_stats",
    "token_observations",
    "token_stats_backward",
    "token_stats_backward_",
    "fused_loss",
    "fused_loss_",
    "scale_",
)


def check_targets(target: Tensor, vocab: int) -> None:
    """On an accelerator reading the values would wait for the device; there such rows become NaN instead."""
    if target.device.type != "cpu":
        return
    outside = (target != IGNORE) & ((target < 0) | (target >= vocab))
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise IndexError(f"target must lie in [0, {vocab}) or be {IGNORE}, got {int(target[at])} at {at}")


def _token_stats(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *readout, backend = args
    check_targets(target, logits.shape[-1])
    return tuple(load(backend).token_stats(logits, target, ReadoutArgs(*readout)))  # type: ignore[return-value]


def _token_observations(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *readout, backend = args
    check_targets(target, logits.shape[-1])
    return tuple(load(backend).token_observations(logits, target, ReadoutArgs(*readout)))


def _token_stats_backward(logits: Tensor, *args: Any) -> Tensor:
    d_logits = load(args[-1]).empty(logits.shape, logits.dtype, logits.device)
    _write_stats_gradient(logits, d_logits, *args)
    return d_logits


def _token_stats_backward_(logits: Tensor, *args: Any) -> None:
    _write_stats_gradient(logits, logits, *args)


def _write_stats_gradient(logits: Tensor, d_logits: Tensor, target: Tensor, *args: Any) -> None:
    stats, gradients, readout, backend = RowStats(*args[:3]), RowGradients(*args[3:6]), args[6:10], args[10]
    load(backend).token_stats_backward(logits, target, stats, gradients, ReadoutArgs(*readout), d_logits)


def _fused_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_logits = load(args[-2]).empty(logits.shape, logits.dtype, logits.device)
    return (*_write_fused(logits, d_logits, *args), d_logits)


def _fused_loss_(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _write_fused(logits, logits, *args)


def _write_fused(logits: Tensor, d_logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    fields, readout, (program, params, backend, kernel) = (
        RowFields(*args[:4]),
        ReadoutArgs(*args[4:8]),
        args[8:],
    )
    check_targets(target, logits.shape[-1])
    rows = load(backend).fused_loss(logits, target, fields, readout, decoded(program), params, d_logits, kernel)
    return rows.loss.sum(), rows.logp, rows.entropy


@cache
def decoded(program: str) -> tuple[int, ...]:
    """An encoded program. Operators take it as text: torch.compile would make every integer a variable."""
    return tuple(map(int, program.split()))


def _scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    load(backend).scale_(x, factor)


for _name in OPERATORS:
    _LIB.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")


def _row(logits: Tensor, target: Tensor) -> Tensor:
    return target.new_empty(target.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


def _gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("unirl::token_stats", lib=_LIB)
def _(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _row(logits, target), _row(logits, target), _row(logits, target)


@torch.library.register_fake("unirl::token_observations", lib=_LIB)
def _(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *(_row(logits, target) for _ in RowObservations._fields[:-1]), torch.empty_like(target)


@torch.library.register_fake("unirl::token_stats_backward", lib=_LIB)
def _(logits: Tensor, *args: Any) -> Tensor:
    return _gradient_like(logits)


@torch.library.register_fake("unirl::fused_loss", lib=_LIB)
def _(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = _row(logits, target)
    return row.new_empty(()), _row(logits, target), _row(logits, target), _gradient_like(logits)


@torch.library.register_fake("unirl::fused_loss_", lib=_LIB)
def _(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _row(logits, target).new_empty(()), _row(logits, target), _row(logits, target)


@torch.library.register_fake("unirl::token_stats_backward_", lib=_LIB)
def _(logits: Tensor, *args: Any) -> None:
    return None


@torch.library.register_fake("unirl::scale_", lib=_LIB)
def _(x: Tensor, factor: Tensor, backend: str) -> None:
    return None


def refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "unirl_kernels gradients cannot be differentiated again: call backward without create_graph=True"
        )


def scaled(d_logits: Tensor, factor: Tensor, backend: str) -> Tensor:
    """d_logits * factor; in place unless the graph is kept, for then d_logits is needed again."""
    refuse_double_backward()
    traced = type(d_logits) is not Tensor or torch.compiler.is_compiling()
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return d_logits * factor
    torch.ops.unirl.scale_(d_logits, factor, backend)
    return d_logits


N_STATS = len(RowStats._fields)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of statistics, or of observations, which begin with the statistics and have no other gradient."""
    logits, target, *readout, backend = inputs
    *scalars, row_temperature = readout
    ctx.mark_non_differentiable(*output[N_STATS:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, *output[:N_STATS], row_temperature)
    ctx.scalars, ctx.backend = scalars, backend


def _stats_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    *tensors, row_temperature = ctx.saved_tensors
    args = (*tensors, *of_stats(gradients), *ctx.scalars, row_temperature, ctx.backend)
    return torch.ops.unirl.token_stats_backward(*args), *[None] * 6


def of_stats(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """d_logp, d_entropy, d_lse as kernels take them, of the gradients of statistics or observations."""
    return [None if g is None else g.contiguous() for g in gradients[:N_STATS]]


for _name in ("token_stats", "token_observations"):
    torch.library.register_autograd(f"unirl::{_name}", _stats_gradient, setup_context=_save_stats, lib=_LIB)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3])


def _loss_gradient(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    (d_logits,) = ctx.saved_tensors
    return (None if d_loss is None else d_logits * d_loss), *[None] * 13


torch.library.register_autograd("unirl::fused_loss", _loss_gradient, setup_context=_save_loss, lib=_LIB)


def as_rows(logits: Tensor) -> Tensor:
    """[B, L, V] of either layout."""
    return logits if logits.dim() == 3 else logits.unsqueeze(0)


class OverwritingStats(torch.autograd.Function):
    """``unirl::token_stats`` or ``token_observations``, whose backward puts the gradient into the logits' memory."""

    @staticmethod
    def forward(ctx: Any, operator: str, logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
        output = getattr(torch.ops.unirl, operator)(as_rows(logits), target, *args)
        _save_stats(ctx, (logits, target, *args), output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        logits, *tensors, row_temperature = ctx.saved_tensors
        d_logits = logits.data
        args = (*tensors, *of_stats(gradients), *ctx.scalars, row_temperature, ctx.backend)
        torch.ops.unirl.token_stats_backward_(as_rows(d_logits), *args)
        consume(logits)
        return None, d_logits, *[None] * 6


class OnePass(torch.autograd.Function):
    """``unirl::fused_loss``, or ``unirl::fused_loss_`` to overwrite the logits. Unlike the operator's own autograd
    it keeps the gradient to itself, and so may scale it in place."""

    @staticmethod
    def forward(ctx: Any, overwrite: bool, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        if overwrite:
            # .data: the gradient must not share the version counter of the logits, which say they changed.
            d_logits = logits.data
            loss, logp, entropy = torch.ops.unirl.fused_loss_(as_rows(d_logits), *args)
        else:
            loss, logp, entropy, d_logits = torch.ops.unirl.fused_loss(as_rows(logits), *args)
            d_logits = d_logits.view(logits.shape)
        ctx.mark_non_differentiable(logp, entropy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_logits)
        ctx.backend = args[-2]
        return loss, logp, entropy

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (d_logits,) = ctx.saved_tensors
        return None, (None if d_loss is None else scaled(d_logits, d_loss, ctx.backend)), *[None] * 13


def consume(logits: Tensor) -> None:
    """Take the memory away from overwritten logits, and from what they are a view of, so that using them fails instead
    of reading a gradient."""
    torch.autograd.graph.increment_version(logits)
    if not torch.compiler.is_compiling():
        for x in (logits, logits._base):
            if x is not None:
                x.data = x.new_empty(0)
