"""What Triton would key a compiled kernel on, for batches that must share one. See ``cubins --keys``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import unirl_kernels as uk
from unirl_kernels.backends.groups import ProgramArgs, ReadoutArgs, RowGradients, RowMoments
from unirl_kernels.backends.triton import geometry, launch
from unirl_kernels.program import trace

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
KERNELS = ("measure", "backward", "one_pass", "scale")


class Recorder:
    """Stands in for a kernel: binds the arguments as the kernel would, and keeps the key by what is left out."""

    def __init__(self, name: str, keys: dict[str, set[str]]) -> None:
        kernel = getattr(launch, name)
        self._bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        self._name, self._arguments, self._keys = name, [p.name for p in kernel.params], keys

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        _, specialization, options = self._bind(*args, **kwargs, debug=False)
        absent = [name for name, value in zip(self._arguments, args, strict=False) if value is None]
        key = repr((specialization, sorted(options.items())))
        self._keys.setdefault(f"{self._name} without {', '.join(absent)}", set()).add(key)


def _logits(*shape: int) -> Tensor:
    """Memory that is never touched."""
    return torch.empty(shape, dtype=torch.bfloat16)


def step(logits: Tensor, beta: float, readout: ReadoutArgs, offset: int = 0) -> None:
    """Everything that is launched in a training step. ``offset`` moves the per-row tensors in memory."""

    def row(*outer: int, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (*outer, *logits.shape[:2])
        return torch.ones(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)

    found = trace([uk.grpo(0.2, beta).objective])
    program = ProgramArgs(found.text, row(len(found.fields)), torch.tensor(found.params, dtype=torch.float64))
    target, gradients = row(dtype=torch.int64), RowGradients(row(), None, None)
    launch.token_stats(logits, target, readout)
    launch.token_observations(logits, target, readout)
    launch.token_stats_backward(logits, target, readout, RowMoments(*row(4)), gradients, logits)
    for kernel in launch.LAUNCHES:
        launch.fused_loss(logits, target, readout, program, logits, kernel)
    launch.scale_(logits, torch.ones(()))


def keys() -> dict[str, list[str]]:
    """Per kernel, the keys of: few and many tokens, other L, other scalars, other strides and addresses."""
    found: dict[str, set[str]] = {}
    for name in KERNELS:
        setattr(launch, name, Recorder(name, found))
    geometry.device_of = lambda device: geometry.Device(132, (9, 0), True, 50 * 2**20)
    plain = ReadoutArgs(1.0, None, 1.0, None)
    step(_logits(1, 1, 20000), 0.04, plain)
    step(_logits(1, 1, 20000), 0.5, ReadoutArgs(0.5, None, 0.7, None))
    step(_logits(3, 16, 20000), 0.04, plain, offset=1)
    step(_logits(2, 17, 20000)[:, :-1], 0.04, plain, offset=3)
    step(_logits(7, 160, 20008)[..., :-8], 0.04, plain)
    step(_logits(1, 1, 2**31 + 80000).as_strided((2, 3, 20000), (2**31 + 16, 20000, 1)), 0.04, plain)
    return {name: sorted(values) for name, values in found.items()}
