"""Binds tensors to kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unirl_kernels.backends import FusedRows, ReadoutArgs, RowFields, RowGradients, RowObservations, RowStats
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.gradient import backward
from unirl_kernels.backends.triton.lowering import device_function
from unirl_kernels.backends.triton.observations import observations
from unirl_kernels.backends.triton.scale import scale
from unirl_kernels.backends.triton.split_row import WORDS, split_row
from unirl_kernels.backends.triton.statistics import statistics
from unirl_kernels.backends.triton.two_sweep import two_sweep
from unirl_kernels.program import OUTPUTS, ZERO
from unirl_kernels.program.ir import HEADER

WARP_SIZE = 64 if torch.version.hip else 32
OPTIONS = {"enable_fp_fusion": True}
"""Products and sums in one operation, as sz + e t; Triton 3.10 announces to stop doing so by default."""

SCALE_PROGRAMS = 1024
"""Programs that multiply a gradient: enough to fill a device, few enough to cost microseconds when the factor is 1."""


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowStats:
    stats = RowStats(*(_row(logits, target) for _ in RowStats._fields))
    _measure(statistics, stats, logits, target, readout)
    return stats


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowObservations:
    values = (_row(logits, target) for _ in RowObservations._fields[:-1])
    rows = RowObservations._make((*values, torch.empty_like(target)))
    _measure(observations, rows, logits, target, readout)
    return rows


def _measure(
    kernel: Any, rows: RowStats | RowObservations, logits: Tensor, target: Tensor, readout: ReadoutArgs
) -> None:
    if target.numel():
        shape = geometry.tile(logits.dtype, logits.shape[-1], WARP_SIZE)
        inner, factor, kind = _readout(readout)
        with torch.cuda.device_of(logits):
            kernel[target.numel(),](
                logits, target, readout.row_temperature, *rows, *logits.shape[1:], *logits.stride()[:2], inner, factor,
                READOUT=kind, **_constants(shape, logits), num_warps=shape.num_warps, **OPTIONS,
            )  # fmt: skip


def token_stats_backward(
    logits: Tensor, target: Tensor, stats: RowStats, gradients: RowGradients, readout: ReadoutArgs, d_logits: Tensor
) -> None:
    if target.numel():
        shape = geometry.tile(logits.dtype, logits.shape[-1], WARP_SIZE)
        inner, factor, kind = _readout(readout)
        with torch.cuda.device_of(logits):
            backward[target.numel(),](
                logits, d_logits, target, readout.row_temperature, *stats, *gradients, *logits.shape[1:],
                *logits.stride()[:2], *d_logits.stride()[:2], inner, factor,
                READOUT=kind, **_constants(shape, logits, d_logits), num_warps=shape.num_warps, **OPTIONS,
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
    if not target.numel():
        return rows
    inner, factor, kind = _readout(readout)
    d_entropy = code[HEADER - len(OUTPUTS) : HEADER][OUTPUTS.index("d_entropy")]
    arguments = (
        logits, d_logits, target, *fields, params, readout.row_temperature, *rows, *logits.shape[1:],
        *logits.stride()[:2], *d_logits.stride()[:2], inner, factor,
    )  # fmt: skip
    constants = {"OBJECTIVE": device_function(tuple(code)), "ENTROPY": d_entropy != ZERO, "READOUT": kind}
    with torch.cuda.device_of(logits):
        LAUNCHES[kernel](arguments, constants, logits, d_logits, target.numel())
    return rows


def _two_sweep(
    arguments: tuple[Any, ...], constants: dict[str, Any], logits: Tensor, d_logits: Tensor, rows: int
) -> None:
    shape = geometry.tile(logits.dtype, logits.shape[-1], WARP_SIZE)
    two_sweep[rows,](
        *arguments, **constants, **_constants(shape, logits, d_logits), num_warps=shape.num_warps, **OPTIONS
    )


def _split_row(
    arguments: tuple[Any, ...], constants: dict[str, Any], logits: Tensor, d_logits: Tensor, rows: int
) -> None:
    vocab = logits.shape[-1]
    shape = geometry.slice_tile(logits.dtype, vocab, constants["READOUT"], WARP_SIZE)
    if triton.knobs.runtime.interpret:
        shape = geometry.whole_row(shape, vocab)
    slices, width = geometry.slices(shape, vocab)
    device = _device(logits.device)
    tile_constants = _constants(shape, logits, d_logits)
    options: dict[str, Any] = dict(OPTIONS)
    if device.is_nvidia:
        plain = tile_constants["ALIGNED"] and not constants["ENTROPY"]
        options["maxnreg"] = geometry.held_registers(logits.dtype, device.capability, plain=plain)
    programs = geometry.programs(shape, vocab, device.multiprocessors, options.get("maxnreg"))
    scratch = _scratch(rows * slices, logits.device)
    split_row[min(rows * slices, programs),](
        *arguments, scratch, rows, width, **constants, **tile_constants, HALF=geometry.half(shape), SLICES=slices,
        PADDED=triton.next_power_of_2(slices), num_warps=shape.num_warps, **options,
    )  # fmt: skip


LAUNCHES = {"two_sweep": _two_sweep, "split_row": _split_row}


def _scratch(records: int, device: torch.device) -> Tensor:
    """The next ticket and the records of the slices, all zero: 32 bytes per 8192 logits."""
    return torch.zeros(1 + records, WORDS.value, dtype=torch.int64, device=device)


def scale_(x: Tensor, factor: Tensor) -> None:
    if not x.numel():
        return
    x = x[(None,) * (3 - x.dim())]
    shape = geometry.tile(x.dtype, x.shape[-1], WARP_SIZE)
    rows = x.shape[0] * x.shape[1]
    with torch.cuda.device_of(x):
        scale[min(rows, SCALE_PROGRAMS),](
            x, factor, rows, *x.shape[1:], *x.stride()[:2],
            **_constants(shape, x), num_warps=shape.num_warps, **OPTIONS,
        )  # fmt: skip


class Device(NamedTuple):
    multiprocessors: int
    capability: tuple[int, int]
    is_nvidia: bool


@cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(1, (0, 0), False)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, (properties.major, properties.minor), not torch.version.hip)


def _row(logits: Tensor, target: Tensor) -> Tensor:
    # Half the time of torch.empty with a shape and a device, and a call makes three.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty_like(target, dtype=dtype, memory_format=torch.contiguous_format)


def _constants(shape: geometry.Tile, *tensors: Tensor) -> dict[str, Any]:
    """Constants of a kernel that follow from its tile and from where the rows of the [B, L, V] tensors lie."""
    return {
        "COMPUTE": tl.float64 if tensors[0].dtype == torch.float64 else tl.float32,
        "ALIGNED": all(_aligned(x, shape.vector) for x in tensors),
        "TILE": shape,
    }


def _aligned(x: Tensor, vector: int) -> bool:
    """Whether every row starts where a vector of its dtype may, and consists of whole ones."""
    (sequences, length, vocab), (stride_b, stride_l, _) = x.shape, x.stride()
    if (sequences > 1 and stride_b % vector) or (length > 1 and stride_l % vector):
        return False
    return vocab % vector == 0 and x.data_ptr() % (vector * x.itemsize) == 0


def _readout(readout: ReadoutArgs) -> tuple[float, float, str]:
    """Slope of u in x, z per u before the temperature of the row, and the kind of u."""
    temperature = 1.0 if readout.row_temperature is not None else readout.temperature
    if readout.softcap is not None:
        return readout.scale / readout.softcap, readout.softcap / temperature, "softcap"
    kind = "negated" if readout.scale < 0 else "linear"
    return -1.0 if readout.scale < 0 else 1.0, abs(readout.scale) / temperature, kind
