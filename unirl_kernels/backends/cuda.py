"""The CUDA backend: native kernels (``csrc/cuda``) for NVIDIA GPUs from sm_90, one read and one write of the logits.

A row is held by a cluster of thread blocks, in their shared memory: V is limited to what 16 of them hold, about 900
thousand logits in fp32 and 1.8 million in 16 bits. fp64 logits are for the eager backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from unirl_kernels.backends import FusedRows, ReadoutArgs, RowFields, RowGradients, RowStats
from unirl_kernels.backends.products import Products, products_of_torch
from unirl_kernels.batch import IGNORE

KERNELS = ("cluster",)

MIN_CAPABILITY = (9, 0)


def unavailable(device: torch.device) -> str | None:
    """None where the backend runs, else the reason why not."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    try:
        _native()
    except ImportError as error:
        return str(error)
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"it needs compute capability 9.0, the device has {capability}"
    return None


@cache
def _native() -> ModuleType:
    """The CUDA part of the extension.

    Raises:
        ImportError: when the extension is not built, or was built without CUDA.
    """
    try:
        native = importlib.import_module("unirl_kernels._C")
    except ImportError as error:
        raise ImportError(f"the native extension is not built or does not load ({error})") from error
    if not hasattr(native, "cuda"):
        raise ImportError("the native extension is built without CUDA (UNIRL_BUILD=cuda says why, see setup.py)")
    return native.cuda


def _per_row(logits: Tensor, target: Tensor) -> Tensor:
    return torch.empty(target.shape, dtype=torch.float32, device=logits.device)


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowStats:
    stats = RowStats(*(_per_row(logits, target) for _ in RowStats._fields))
    _native().token_stats(logits, target, IGNORE, readout, stats)
    return stats


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    stats: RowStats,
    gradients: RowGradients,
    readout: ReadoutArgs,
    d_logits: Tensor,
) -> None:
    _native().token_stats_backward(logits, target, IGNORE, readout, stats, gradients, d_logits)


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
    rows = FusedRows(*(_per_row(logits, target) for _ in FusedRows._fields))
    _native().fused_loss(logits, target, IGNORE, readout, fields, code, params, d_logits, rows)
    return rows


def products(weight: Tensor, dtype: torch.dtype) -> Products:
    return products_of_torch(weight, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def release_memory() -> int:
    return 0


def scale_(x: Tensor, factor: Tensor) -> None:
    _native().scale_(x[(None,) * (3 - x.dim())], factor.to(torch.float32))
