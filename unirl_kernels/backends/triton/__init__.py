"""The Triton backend: NVIDIA GPUs from sm_80 and AMD GPUs; on the CPU under Triton's interpreter.

Importing this package does not import Triton: ``unavailable`` can say that it is missing.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from unirl_kernels.backends import (
    FusedRows,
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
)
from unirl_kernels.backends.torch_defaults import empty, matmuls, release_memory
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.geometry import KERNELS

__all__ = [
    "KERNELS",
    "empty",
    "fused_loss",
    "kernels_by_vocab",
    "matmuls",
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


def kernels_by_vocab(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return geometry.kernels_by_vocab(geometry.device_of(device), dtype)


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
    from unirl_kernels.backends.triton import launch

    return launch.token_stats(logits, target, readout)


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed:
    from unirl_kernels.backends.triton import launch

    return launch.token_observations(logits, target, readout)


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    d_logits: Tensor,
) -> None:
    from unirl_kernels.backends.triton import launch

    launch.token_stats_backward(logits, target, readout, moments, gradients, d_logits)


def fused_loss(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    d_logits: Tensor,
    kernel: str,
) -> FusedRows:
    from unirl_kernels.backends.triton import launch

    return launch.fused_loss(logits, target, readout, program, d_logits, kernel)


def scale_(x: Tensor, factor: Tensor) -> None:
    from unirl_kernels.backends.triton import launch

    launch.scale_(x, factor)
