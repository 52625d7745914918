"""Checks of tensors that users give. Errors name the argument, what was expected, and what came."""

from __future__ import annotations

import torch
from torch import Tensor


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_values(x: Tensor) -> bool:
    """Whether a tensor has values: not one on the meta device, nor one of FakeTensorMode, which is about shapes."""
    return not x.is_meta and type(x).__name__ != "FakeTensor"


def readable(x: Tensor) -> bool:
    """Whether reading values costs nothing: on an accelerator it would wait for the device."""
    return x.device.type == "cpu" and has_values(x) and not torch.compiler.is_compiling()


def check_target(target: Tensor) -> None:
    """Raise a ``TypeError`` or ``ValueError`` unless targets are padded or packed, int64, and have memory."""
    check_dtype("target", target, torch.int64)
    check_memory("target", target)
    if target.dim() not in (1, 2):
        hint = "; fold its first dimensions into the batch: target.flatten(0, -2)" if target.dim() > 2 else ""
        raise ValueError(f"target must have shape [B, L] or [T], got {tuple(target.shape)}{hint}")


def check_dtype(name: str, value: object, *dtypes: torch.dtype) -> None:
    """Raise a ``TypeError`` that names the argument unless it is a dense tensor of one of the dtypes."""
    expected = " or ".join(map(name_of, dtypes))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of {expected}, got {type(value).__name__}")
    check_layout(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}, got {name_of(value.dtype)}")


def check_layout(name: str, value: Tensor) -> None:
    """Raise a ``TypeError`` for a nested or sparse tensor."""
    if value.is_nested or value.layout != torch.strided:
        kind = "a nested tensor: pack it, with cu_seqlens" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_memory(name: str, value: Tensor) -> None:
    """Raise a ``ValueError`` for a plain tensor whose memory is freed: PyTorch's operations would read there."""
    if type(value) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling() or not has_values(value):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return
    if value.numel() and value.untyped_storage().nbytes() < value.itemsize:
        raise ValueError(f"{name} must have memory, got a tensor of shape {tuple(value.shape)} whose storage is freed")


def check_device(name: str, value: Tensor, device: torch.device, like: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {value.device}")
