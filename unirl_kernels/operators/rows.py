"""Operators on rows of logits. They dispatch to the backend that is named, never choose one and never fall back.

Logits are [B, L, V] and per-row tensors [B, L]; the packed layout is B = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import (
    ELSEWHERE,
    FusedRows,
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowObservations,
    RowStats,
    load,
)
from unirl_kernels.batch import IGNORE, has_values
from unirl_kernels.operators.declare import operator


class Fused(NamedTuple):
    loss: Tensor  # []
    stats: RowStats


class FusedWithGradient(NamedTuple):
    loss: Tensor  # []
    stats: RowStats
    d_logits: Tensor  # [B, L, V]


def check_targets(target: Tensor, vocab: int) -> None:
    """Raise an ``IndexError`` for a target outside the vocabulary.

    On an accelerator reading the values would wait for the device; there such rows become NaN instead.
    """
    if target.device.type != "cpu" or not has_values(target):
        return
    outside = (target != IGNORE) & ((target < 0) | (target >= vocab))
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise IndexError(f"target must lie in [0, {vocab}) or be {IGNORE}, got {int(target[at])} at {at}")


def check_row_targets(target: Tensor, vocab: int) -> None:
    """``check_targets`` of rows that may be shards: their target may be ELSEWHERE."""
    try:
        check_targets(target, vocab)
    except IndexError:
        check_targets(target.masked_fill(target == ELSEWHERE, IGNORE), vocab)


def row_like(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised values of rows whose logits have a dtype."""
    return target.new_empty(target.shape, dtype=torch.promote_types(dtype, torch.float32))


def stats_like(target: Tensor, dtype: torch.dtype) -> RowStats:
    return RowStats(*(row_like(target, dtype) for _ in RowStats._fields))


def moments_like(target: Tensor, dtype: torch.dtype) -> RowMoments:
    return RowMoments(*(row_like(target, dtype) for _ in RowMoments._fields))


def observations_like(target: Tensor, dtype: torch.dtype) -> RowObservations:
    values = (row_like(target, dtype) for _ in RowObservations._fields[:-1])
    return RowObservations._make((*values, torch.empty_like(target)))


def _gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fake_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str) -> Measured:
    return Measured(stats_like(target, logits.dtype), moments_like(target, logits.dtype))


@operator(fake=_fake_stats)
def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str) -> Measured:
    check_row_targets(target, logits.shape[-1])
    return load(backend).token_stats(logits, target, readout)


def _fake_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str) -> Observed:
    return Observed(*_fake_stats(logits, target, readout, backend), observations_like(target, logits.dtype))


@operator(fake=_fake_observations)
def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs, backend: str) -> Observed:
    check_row_targets(target, logits.shape[-1])
    return load(backend).token_observations(logits, target, readout)


def _fake_backward(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, moments: RowMoments, gradients: RowGradients, backend: str
) -> Tensor:
    return _gradient_like(logits)


@operator(fake=_fake_backward)
def token_stats_backward(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, moments: RowMoments, gradients: RowGradients, backend: str
) -> Tensor:
    kernels = load(backend)
    d_logits = kernels.empty(logits.shape, logits.dtype, logits.device)
    kernels.token_stats_backward(logits, target, readout, moments, gradients, d_logits)
    return d_logits


def _fake_overwriting_backward(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, moments: RowMoments, gradients: RowGradients, backend: str
) -> None:
    return None


@operator(fake=_fake_overwriting_backward, mutates=("logits",))
def token_stats_backward_(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, moments: RowMoments, gradients: RowGradients, backend: str
) -> None:
    load(backend).token_stats_backward(logits, target, readout, moments, gradients, logits)


def _fake_overwriting_loss(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, program: ProgramArgs, backend: str, kernel: str
) -> Fused:
    return Fused(_loss_like(target, logits), stats_like(target, logits.dtype))


def _loss_like(target: Tensor, logits: Tensor) -> Tensor:
    return target.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))


def _fake_loss(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, program: ProgramArgs, backend: str, kernel: str
) -> FusedWithGradient:
    fused = _fake_overwriting_loss(logits, target, readout, program, backend, kernel)
    return FusedWithGradient(*fused, _gradient_like(logits))


def _reduced(rows: FusedRows, loss: Tensor) -> Fused:
    torch.sum(rows.loss, (0, 1), out=loss)
    return Fused(loss, RowStats(rows.logp, rows.entropy, rows.lse))


@operator(fake=_fake_loss)
def fused_loss(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, program: ProgramArgs, backend: str, kernel: str
) -> FusedWithGradient:
    check_targets(target, logits.shape[-1])
    kernels = load(backend)
    d_logits = kernels.empty(logits.shape, logits.dtype, logits.device)
    rows = kernels.fused_loss(logits, target, readout, program, d_logits, kernel)
    return FusedWithGradient(*_reduced(rows, _loss_like(target, logits)), d_logits)


@operator(fake=_fake_overwriting_loss, mutates=("logits",))
def fused_loss_(
    logits: Tensor, target: Tensor, readout: ReadoutArgs, program: ProgramArgs, backend: str, kernel: str
) -> Fused:
    check_targets(target, logits.shape[-1])
    loss = _loss_like(target, logits)  # nothing may fail for want of memory once the logits are overwritten
    return _reduced(load(backend).fused_loss(logits, target, readout, program, logits, kernel), loss)


def _fake_scale(x: Tensor, factor: Tensor, backend: str) -> None:
    return None


@operator(fake=_fake_scale, mutates=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    load(backend).scale_(x, factor)
