"""The Triton backend: NVIDIA GPUs from sm_80 and AMD GPUs; on the CPU under Triton's interpreter.

Importing this package does not import Triton, so that ``unavailable`` can say that Triton is missing.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch

from unirl_kernels.backends.torch_defaults import empty as empty
from unirl_kernels.backends.torch_defaults import matmuls as matmuls
from unirl_kernels.backends.torch_defaults import release_memory as release_memory
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.geometry import KERNELS as KERNELS

LAUNCHED = ("token_stats", "token_observations", "token_stats_backward", "fused_loss", "scale_")

MIN_CAPABILITY = (8, 0)


def unavailable(device: torch.device) -> str | None:
    """None where the backend runs, else the reason why not."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        import triton

        # Triton decides this at import; setting the variable later has no effect.
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


def __getattr__(name: str) -> Any:
    """Import the launch functions, and Triton with them, at the first use."""
    if name not in LAUNCHED:
        raise AttributeError(name)
    globals()[name] = getattr(importlib.import_module(f"{__name__}.launch"), name)
    return globals()[name]
