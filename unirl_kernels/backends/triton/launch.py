"""The functions of the backend: they pass tensors to kernels and launch them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from unirl_kernels.backends.groups import (
    FusedRows,
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowObservations,
    measured_like,
    observed_like,
    rows_like,
)
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.gradient import backward
from unirl_kernels.backends.triton.lowering import device_function
from unirl_kernels.backends.triton.measure import measure
from unirl_kernels.backends.triton.one_pass import one_pass
from unirl_kernels.backends.triton.scale import scale
from unirl_kernels.backends.triton.split_row import RECORD
from unirl_kernels.program import parsed

WARP_SIZE = 64 if torch.version.hip else 32
OPTIONS = {"enable_fp_fusion": True}
"""Fuse multiplications and additions, as in sz + e t. Triton 3.10 announces that it will not do so by default."""

SCALE_PROGRAMS = 1024
"""Programs that scale a gradient: enough to fill a device, but few enough that a factor of 1 costs microseconds."""


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
    rows = measured_like(target, logits.dtype)
    _measure((*rows.stats, *rows.moments, *[None] * len(RowObservations._fields)), logits, target, readout)
    return rows


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed:
    rows = observed_like(target, logits.dtype)
    _measure((*rows.stats, *rows.moments, *rows.observations), logits, target, readout)
    return rows


def _measure(rows: tuple[Tensor | None, ...], logits: Tensor, target: Tensor, readout: ReadoutArgs) -> None:
    if target.numel():
        shape = _tile(logits)
        inner, factor, kind = _readout(readout)
        with torch.cuda.device_of(logits):
            measure[target.numel(),](
                logits, target, readout.row_temperature, *rows, *logits.shape[1:], *logits.stride()[:2], inner, factor,
                READOUT=kind, TILE=shape, num_warps=shape.num_warps, **OPTIONS,
            )  # fmt: skip


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    d_logits: Tensor,
) -> None:
    if target.numel():
        shape = _tile(logits, d_logits)
        inner, factor, kind = _readout(readout)
        with torch.cuda.device_of(logits):
            backward[target.numel(),](
                logits, d_logits, target, readout.row_temperature, *moments, *gradients, *logits.shape[1:],
                *logits.stride()[:2], *d_logits.stride()[:2], inner, factor,
                READOUT=kind, TILE=shape, num_warps=shape.num_warps, **OPTIONS,
            )  # fmt: skip


def fused_loss(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    d_logits: Tensor,
    kernel: str,
) -> FusedRows:
    rows = FusedRows(*rows_like(target, logits.dtype, 4))
    if not target.numel():
        return rows
    inner, factor, kind = _readout(readout)
    found = parsed(program.text)
    arguments = (
        logits, d_logits, target, program.fields, program.params, readout.row_temperature, *rows, *logits.shape[1:],
        *logits.stride()[:2], *d_logits.stride()[:2], inner, factor,
    )  # fmt: skip
    constants = {
        "OBJECTIVE": device_function(program.text),
        "FIELDS": found.n_fields,
        "ENTROPY": found.has_entropy_gradient,
        "READOUT": kind,
    }
    with torch.cuda.device_of(logits):
        LAUNCHES[kernel](arguments, constants, logits, d_logits)
    return rows


def _two_sweep(arguments: tuple[Any, ...], constants: dict[str, Any], logits: Tensor, d_logits: Tensor) -> None:
    device = geometry.device_of(logits.device)
    shape = _placed(geometry.two_sweep_tile(device, logits.dtype, logits.shape[-1], WARP_SIZE), logits, d_logits)
    rows = logits.shape[0] * logits.shape[1]
    one_pass[rows,](*arguments, None, rows, **constants, SHAPE=shape, num_warps=shape.num_warps, **OPTIONS)


def _split_row(arguments: tuple[Any, ...], constants: dict[str, Any], logits: Tensor, d_logits: Tensor) -> None:
    sequences, length, vocab = logits.shape
    rows = sequences * length
    shape = geometry.slice_tile(logits.dtype, vocab, constants["READOUT"], WARP_SIZE)
    if triton.knobs.runtime.interpret:
        shape = geometry.whole_row(shape, vocab)
    shape = _placed(shape, logits, d_logits)
    split = geometry.split(shape, vocab)
    device = geometry.device_of(logits.device)
    options: dict[str, Any] = dict(OPTIONS)
    if device.is_nvidia:
        plain = shape.aligned and not constants["ENTROPY"]
        options["maxnreg"] = geometry.held_registers(logits.dtype, device.capability, plain=plain)
        options["launch_cooperative_grid"] = bool(geometry.SIZES.cooperative)
    registers, cooperative = options.get("maxnreg"), options.get("launch_cooperative_grid", False)
    programs = geometry.programs(shape, vocab, device.multiprocessors, registers, cooperative=cooperative)
    scratch = _scratch(rows * split.slices, logits.device)
    one_pass[min(rows * split.slices, programs),](
        *arguments, scratch, rows, **constants, SHAPE=split, num_warps=shape.num_warps, **options
    )


LAUNCHES = {"two_sweep": _two_sweep, "split_row": _split_row}


def _scratch(records: int, device: torch.device) -> Tensor:
    """Zeros for the ticket counter and the records of the slices: 32 bytes per 8192 logits."""
    return torch.zeros(1 + records, RECORD.value, dtype=torch.int64, device=device)


def scale_(x: Tensor, factor: Tensor) -> None:
    if not x.numel():
        return
    x = x[(None,) * (3 - x.dim())]
    shape = _tile(x)
    rows = x.shape[0] * x.shape[1]
    with torch.cuda.device_of(x):
        scale[min(rows, SCALE_PROGRAMS),](
            x, factor, rows, *x.shape[1:], *x.stride()[:2], TILE=shape, num_warps=shape.num_warps, **OPTIONS
        )


def _tile(x: Tensor, *others: Tensor) -> geometry.Tile:
    """The tile of a sweep over the rows of [B, L, V] tensors."""
    return _placed(geometry.tile(x.dtype, x.shape[-1], WARP_SIZE), x, *others)


def _placed(shape: geometry.Tile, *tensors: Tensor) -> geometry.Tile:
    """The tile with ``aligned`` set for the addresses of these tensors."""
    return shape._replace(aligned=all(_aligned(x, shape.vector) for x in tensors))


def _aligned(x: Tensor, vector: int) -> bool:
    """Whether every row starts at a vector boundary and consists of whole vectors."""
    (sequences, length, vocab), (stride_b, stride_l, _) = x.shape, x.stride()
    if (sequences > 1 and stride_b % vector) or (length > 1 and stride_l % vector):
        return False
    return vocab % vector == 0 and x.data_ptr() % (vector * x.itemsize) == 0


def _readout(readout: ReadoutArgs) -> tuple[float, float, str]:
    """du/dx at x = 0, kappa without the temperature of the row, and the kind of u."""
    temperature = 1.0 if readout.row_temperature is not None else readout.temperature
    if readout.softcap is not None:
        return readout.scale / readout.softcap, readout.softcap / temperature, "softcap"
    kind = "negated" if readout.scale < 0 else "linear"
    return -1.0 if readout.scale < 0 else 1.0, abs(readout.scale) / temperature, kind
