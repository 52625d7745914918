"""The Triton backend: NVIDIA GPUs from sm_80 and AMD GPUs; on the CPU under Triton's interpreter.

Importing this package does not import Triton: ``unavailable`` can say that it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from unirl_kernels.backends import FusedRows, ReadoutArgs, RowFields, RowGradients, RowObservations, RowStats
from unirl_kernels.backends.plain import empty, products, release_memory
from unirl_kernels.backends.triton.geometry import KERNELS

__all__ = [
    "KERNELS",
    "empty",
    "fused_loss",
    "products",
    "release_memory",
    "scale_",
    "token_observations",
    "token_stats",
    "token_stats_backward",
    "unavailable",
]

MIN_CAPABILITY = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """None where the backend runs, else the reason why not."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        import triton

        # Triton decides when it is imported; a variable set later changes nothing.
        if isinstance(triton.language.standard.cdiv, triton.JITFunction):
            return "it runs on a CPU under Triton's interpreter only: set TRITON_INTERPRET=1 before importing triton"
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"it needs compute capability 8.0, the device has {capability}"
    return None


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowStats:
    from unirl_kernels.backends.triton import launch

    return launch.token_stats(logits, target, readout)


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowObservations:
    from unirl_kernels.backends.triton import launch

    return launch.token_observations(logits, target, readout)


def token_stats_backward(
    logits: Tensor, target: Tensor, stats: RowStats, gradients: RowGradients, readout: ReadoutArgs, d_logits: Tensor
) -> None:
    from unirl_kernels.backends.triton import launch

    launch.token_stats_backward(logits, target, stats, gradients, readout, d_logits)


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
    from unirl_kernels.backends.triton import launch

    return launch.fused_loss(logits, target, fields, readout, code, params, d_logits, kernel)


def scale_(x: Tensor, factor: Tensor) -> None:
    from unirl_kernels.backends.triton import launch

    launch.scale_(x, factor)
