"""Buffers and matmuls of torch, for backends without their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unirl_kernels.backends.matmuls import Halved, Matmuls, Mixed, Widened


def matmuls(weight: Tensor, dtype: torch.dtype) -> Matmuls:
    """The matmuls of a linear head's weight, [V, D], with operands in ``dtype``."""
    if weight.is_cuda and dtype == torch.bfloat16:
        return Mixed(weight.to(dtype))
    if weight.is_cuda and dtype == torch.float16:
        return Halved(weight.to(dtype))
    return Widened(weight, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def release_memory() -> int:
    """Frees nothing, since nothing is kept."""
    return 0
