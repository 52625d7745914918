"""The CUDA backend: native kernels (``csrc/cuda``) for NVIDIA sm_90 and sm_100, one read and one write of the logits.

A cluster of thread blocks keeps a row in shared memory. So V is limited by the memory of 16 blocks: about 900 thousand
logits in fp32, 1.8 million in 16 bits. fp64 logits need the eager backend.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from unirl_kernels.backends.groups import Observed, ReadoutArgs
from unirl_kernels.backends.native import PACKAGE, RowKernels, extension
from unirl_kernels.backends.torch_defaults import empty as empty
from unirl_kernels.backends.torch_defaults import matmuls as matmuls
from unirl_kernels.backends.torch_defaults import release_memory as release_memory

KERNELS = ("cluster",)

BYTES_BY_DEFAULT = 8 * 76000
"""The largest row, in bytes, for a cluster of 8 blocks with three blocks per multiprocessor (``FAIR_SLICE`` of
``csrc/cuda/geometry.h``). Longer rows need a cluster of 16, which not every device supports."""

CAPABILITIES = (9, 10)
"""Major numbers. A block of 12.0 has 99 KiB of shared memory, less than a slice may take."""


def unavailable(device: torch.device) -> str | None:
    """None if the backend can run, else the reason why it cannot."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    try:
        _native()
    except ImportError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability(device)
    if major not in CAPABILITIES:
        return f"it needs compute capability 9.x or 10.x, the device has {major}.{minor}"
    return None


def kernels_by_vocab(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Rows that fit clusters of portable size well; none for fp64, which needs the eager backend."""
    return (("cluster", BYTES_BY_DEFAULT // dtype.itemsize if dtype.itemsize <= 4 else 0),)


@cache
def _native() -> ModuleType:
    """The extension with the CUDA kernels.

    Raises:
        ImportError: when it is not built or does not load.
    """
    if importlib.util.find_spec(f"{PACKAGE}._cuda") is None:
        raise ImportError("the native extension is built without CUDA (UNIRL_BUILD=cuda says why, see setup.py)")
    return extension("_cuda")


_rows = RowKernels(_native)
token_stats, token_stats_backward, fused_loss = _rows.token_stats, _rows.token_stats_backward, _rows.fused_loss


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed:
    """
    Raises:
        RuntimeError: always; there is no such kernel.
    """
    raise RuntimeError("backend 'cuda' has no kernel for observations; Plan(backend='triton') has one")


def scale_(x: Tensor, factor: Tensor) -> None:
    if x.numel():
        _native().scale_(x[(None,) * (3 - x.dim())], factor.to(torch.float32))
