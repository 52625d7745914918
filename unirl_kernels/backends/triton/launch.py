"""Binds tensors to kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from unirl_kernels.backends import FusedRows, ReadoutArgs, RowFields, RowGradients, RowStats
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.gradient import backward
from unirl_kernels.backends.triton.lowering import device_function
from unirl_kernels.backends.triton.scale import scale
from unirl_kernels.backends.triton.statistics import statistics
from unirl_kernels.backends.triton.two_sweep import two_sweep
from unirl_kernels.program import OUTPUTS, ZERO
from unirl_kernels.program.ir import HEADER

WARP_SIZE = 64 if torch.version.hip else 32
SCALE_PROGRAMS = 1024


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowStats:
    stats = RowStats(*(_row(logits, target) for _ in RowStats._fields))
    if target.numel():
        shape, constants = _tile(logits, logits)
        inner, factor, kind = _readout(readout)
        with torch.cuda.device_of(logits):
            statistics[target.numel(),](
                logits, target, readout.row_temperature, *stats, *logits.shape[1:], *logits.stride()[:2], inner, factor,
                READOUT=kind, **constants, num_warps=shape.num_warps,
            )  # fmt: skip
    return stats


def token_stats_backward(
    logits: Tensor, target: Tensor, stats: RowStats, gradients: RowGradients, readout: ReadoutArgs, d_logits: Tensor
) -> None:
    if target.numel():
        shape, constants = _tile(logits, d_logits)
        inner, factor, kind = _readout(readout)
        with torch.cuda.device_of(logits):
            backward[target.numel(),](
                logits, d_logits, target, readout.row_temperature, *stats, *gradients, *logits.shape[1:],
                *logits.stride()[:2], *d_logits.stride()[:2], inner, factor,
                READOUT=kind, **constants, num_warps=shape.num_warps,
            )  # fmt: skip


def fused_loss(
    logits: Tensor,
    target: Tensor,
    fields: RowFields,
    readout: ReadoutArgs,
    code: Sequence[int],
    params: Tensor,
    d_logits: Tensor,
    kernel: str,
) -> FusedRows:
    rows = FusedRows(*(_row(logits, target) for _ in FusedRows._fields))
    if target.numel():
        shape, constants = _tile(logits, d_logits)
        inner, factor, kind = _readout(readout)
        d_entropy = code[HEADER - len(OUTPUTS) : HEADER][OUTPUTS.index("d_entropy")]
        with torch.cuda.device_of(logits):
            two_sweep[target.numel(),](
                logits, d_logits, target, *fields, params, readout.row_temperature, *rows, *logits.shape[1:],
                *logits.stride()[:2], *d_logits.stride()[:2], inner, factor,
                OBJECTIVE=device_function(tuple(code)), ENTROPY=d_entropy != ZERO,
                READOUT=kind, **constants, num_warps=shape.num_warps,
            )  # fmt: skip
    return rows


def scale_(x: Tensor, factor: Tensor) -> None:
    if not x.numel():
        return
    x = x[(None,) * (3 - x.dim())]
    shape, constants = _tile(x, x)
    rows = x.shape[0] * x.shape[1]
    with torch.cuda.device_of(x):
        scale[min(rows, SCALE_PROGRAMS),](
            x, factor, rows, *x.shape[1:], *x.stride()[:2], **constants, num_warps=shape.num_warps
        )


def _row(logits: Tensor, target: Tensor) -> Tensor:
    return torch.empty(target.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)


def _tile(logits: Tensor, d_logits: Tensor) -> tuple[geometry.Tile, dict[str, Any]]:
    """Shape of the tile, and the constants of a kernel that follow from it and from where the rows lie."""
    shape = geometry.tile(logits.dtype, logits.shape[-1], WARP_SIZE)
    constants = {
        "COMPUTE": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "ALIGNED": _aligned(logits, shape.vector) and _aligned(d_logits, shape.vector),
        "LANES": shape.lanes,
        "VECTOR": shape.vector,
        "UNROLL": shape.unroll,
    }
    return shape, constants


def _aligned(x: Tensor, vector: int) -> bool:
    """Whether every row starts at a multiple of 16 bytes and consists of whole vectors."""
    starts = all(n == 1 or stride % vector == 0 for n, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return starts and x.shape[-1] % vector == 0 and x.data_ptr() % geometry.VECTOR_BYTES == 0


def _readout(readout: ReadoutArgs) -> tuple[float, float, str]:
    """Slope of u in x, z per u before the temperature of the row, and the kind of u."""
    temperature = 1.0 if readout.row_temperature is not None else readout.temperature
    if readout.softcap is not None:
        return readout.scale / readout.softcap, readout.softcap / temperature, "softcap"
    kind = "negated" if readout.scale < 0 else "linear"
    return -1.0 if readout.scale < 0 else 1.0, abs(readout.scale) / temperature, kind
