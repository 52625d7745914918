"""Operators on rows of logits. They dispatch to the named backend: they never choose one, and there is no fallback.

Logits are [B, L, V] and per-row tensors [B, L]; the packed layout is B = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import load
from unirl_kernels.backends.groups import (
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowStats,
    measured_like,
    observed_like,
    row_dtype,
    rows_like,
)
from unirl_kernels.batch import IGNORE
from unirl_kernels.checks import has_values
from unirl_kernels.operators.declare import operator


class Fused(NamedTuple):
    loss: Tensor  # []
    stats: RowStats


class FusedWithGradient(NamedTuple):
    loss: Tensor  # []
    stats: RowStats
    d_logits: Tensor  # [B, L, V]


def check_targets(target: Tensor, vocab: int) -> None:
    """Raise an ``IndexError`` for a target outside the vocabulary, with its index: (b, l), or (t,) of a single row.

    On an accelerator, reading the values would wait for the device. There such rows become NaN instead.
    """
    if target.device.type != "cpu" or not has_values(target) or not target.numel():
        return
    least, largest = torch.where(target == IGNORE, 0, target).aminmax()
    if int(least) < 0 or int(largest) >= vocab:
        outside = (target != IGNORE) & ((target < 0) | (target >= vocab))
        at = tuple(outside.nonzero()[0].tolist())
        where = at if len(target) > 1 else at[-1:]
        raise IndexError(f"target must lie in [0, {vocab}) or be {IGNORE}, got {int(target[at])} at {where}")


def _gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _sum_like(target: Tensor, logits: Tensor) -> Tensor:
    return target.new_empty((), dtype=row_dtype(logits.dtype))


def _loss_like(target: Tensor, logits: Tensor) -> Fused:
    return Fused(_sum_like(target, logits), RowStats._make(rows_like(target, logits.dtype, 3)))


@operator(fake=lambda logits, target, *_: measured_like(target, logits.dtype))
def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str) -> Measured:
    check_targets(target, logits.shape[-1])
    return load(backend).token_stats(logits, target, readout)


@operator(fake=lambda logits, target, *_: observed_like(target, logits.dtype))
def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str) -> Observed:
    check_targets(target, logits.shape[-1])
    return load(backend).token_observations(logits, target, readout)


@operator(fake=lambda logits, *_: _gradient_like(logits))
def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    columns: int,
    backend: str,
) -> Tensor:
    """The gradient of the first ``columns`` columns. The others are padding of a shard; their gradient is 0."""
    kernels = load(backend)
    d_logits = kernels.empty(logits.shape, logits.dtype, logits.device)
    used, d_used = _first(logits, columns), _first(d_logits, columns)
    if columns:
        kernels.token_stats_backward(used, target, readout, moments, gradients, d_used)
    return _zero_from(d_logits, columns)


@operator(fake=lambda *_: None, mutates=("logits",))
def token_stats_backward_(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    columns: int,
    backend: str,
) -> None:
    used = _first(logits, columns)
    if columns:
        load(backend).token_stats_backward(used, target, readout, moments, gradients, used)
    _zero_from(logits, columns)


def _first(x: Tensor, columns: int) -> Tensor:
    return x if columns == x.shape[-1] else x[..., :columns]


def _zero_from(x: Tensor, column: int) -> Tensor:
    if column < x.shape[-1]:
        x[..., column:] = 0
    return x


@operator(fake=lambda logits, target, *_: FusedWithGradient(*_loss_like(target, logits), _gradient_like(logits)))
def fused_loss(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, program: ProgramArgs, backend: str, kernel: str
) -> FusedWithGradient:
    check_targets(target, logits.shape[-1])
    kernels = load(backend)
    d_logits = kernels.empty(logits.shape, logits.dtype, logits.device)
    rows = kernels.fused_loss(logits, target, readout, program, d_logits, kernel)
    return FusedWithGradient(rows.loss.sum(), RowStats(*rows[1:]), d_logits)


@operator(fake=lambda logits, target, *_: _loss_like(target, logits), mutates=("logits",))
def fused_loss_(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, program: ProgramArgs, backend: str, kernel: str
) -> Fused:
    check_targets(target, logits.shape[-1])
    loss = _sum_like(target, logits)  # allocate before the kernel: after it nothing may fail for lack of memory
    rows = load(backend).fused_loss(logits, target, readout, program, logits, kernel)
    return Fused(torch.sum(rows.loss, (0, 1), out=loss), RowStats(*rows[1:]))


@operator(fake=lambda *_: None, mutates=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    load(backend).scale_(x, factor)
