"""The CPU backend: native kernels (``csrc``), one read and one write of the logits, on any x86-64 or ARM machine.

Environment variables, read when the backend is first used:
    UNIRL_CPU_ISA           the instruction set: avx512, avx2 or baseline; by default the widest of the machine
    UNIRL_CPU_MATMULS       the matmul of bf16 operands: panels-fp32, panels-bf16, brgemm-fp32 or brgemm-bf16; by
                            default the best for the kind of core. Other operands use the same family in fp32
    UNIRL_CPU_CACHE_BYTES   how many bytes of freed gradients are kept for reuse, see ``empty``; 0 keeps none
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from unirl_kernels.backends import torch_defaults
from unirl_kernels.backends.matmuls import Matmuls
from unirl_kernels.backends.native import RowKernels, extension

KERNELS = ("rows",)

CACHE_BYTES = 2 * 2**30
"""Default of UNIRL_CPU_CACHE_BYTES."""


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it runs on the cpu only"
    try:
        _native()
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def kernels_by_vocab(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return ((KERNELS[0], sys.maxsize),)


@cache
def _native() -> ModuleType:
    """The extension, with the settings of the environment applied.

    Raises:
        ImportError: when the extension is not built.
        RuntimeError, ValueError: when the environment has an impossible setting.
    """
    native = extension()
    native.instruction_set()
    native.matmuls_unavailable(torch.float32)
    native.limit_kept_bytes(_cache_bytes())
    return native


def _cache_bytes() -> int:
    text = os.environ.get("UNIRL_CPU_CACHE_BYTES", str(CACHE_BYTES))
    if not text.isdecimal():
        raise ValueError(f"UNIRL_CPU_CACHE_BYTES must be a number of bytes, got {text!r}")
    return min(int(text), sys.maxsize)


_rows = RowKernels(_native)
token_stats, token_stats_backward, fused_loss = _rows.token_stats, _rows.token_stats_backward, _rows.fused_loss
token_observations = _rows.token_observations


def matmuls(weight: Tensor, dtype: torch.dtype) -> Matmuls:
    return torch_defaults.matmuls(weight, dtype) if matmuls_unavailable(dtype) else NativeMatmuls(weight.to(dtype))


@dataclass(frozen=True, eq=False)
class NativeMatmuls(Matmuls):
    """Matmuls of ``csrc/cpu``, one of ``matmul_variants``.

    The bits of a row depend neither on the other rows nor on the number of threads.

    Operands are float32, bfloat16 or float16, all the same, with any strides; the bias has any floating dtype. Results
    are float32, with any row stride. Gradients of logits are float32 with any strides; they are rounded to bf16 if
    ``matmul_arithmetic`` is bf16. Anything else is a ValueError.
    """

    repeatable: ClassVar[bool] = True

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _native().logits_matmul(hidden, self.weight, bias, out)

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        out = d_logits.new_empty(d_logits.shape[0], self.weight.shape[1])
        _native().d_hidden_matmul(d_logits, self.weight, out)
        return out

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        _native().d_weight_matmul(d_logits, hidden, total, not first)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised contiguous memory for a gradient or another vocabulary-sized tensor.

    New memory from the system costs more than the whole loss, since it is zeroed page by page at the first access
    (figures in benchmarks/NOTES.md). So gradients of 2 MiB and more use huge pages, and freed ones are kept for reuse:
    at most ``UNIRL_CPU_CACHE_BYTES`` in all (default 2 GiB); the oldest are freed first. If no kept gradient is large
    enough, all of them are freed before new memory is allocated. ``release_memory`` frees them at once.
    """
    return _native().empty(shape, dtype)


def release_memory() -> int:
    """Free the memory that is kept for reuse.

    Returns:
        Bytes freed.
    """
    native = _native()
    kept = native.kept_bytes()
    native.limit_kept_bytes(0)
    native.limit_kept_bytes(_cache_bytes())
    return kept


def scale_(x: Tensor, factor: Tensor) -> None:
    if factor != 1:
        x.mul_(factor)


def report() -> dict[str, str]:
    """What runs on this machine, as text for ``python -m unirl_kernels doctor``.

    Raises:
        ImportError, RuntimeError, ValueError: as ``unavailable`` says.
    """
    native = _native()
    return {
        "instruction set": native.instruction_set(),
        "compiled": ", ".join(native.compiled_instruction_sets()),
        "threads": str(torch.get_num_threads()),
        "core": native.core_kind(),
        "matmuls": _matmuls(native),
        "gradient memory kept": f"{native.kept_bytes()} of at most {_cache_bytes()} bytes",
    }


def _matmuls(native: ModuleType) -> str:
    variants = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if reason := native.matmuls_unavailable(dtype):
            return f"torch's own: {reason}"
        variants.append(f"{str(dtype).removeprefix('torch.')} by {native.matmul_variant(dtype)}")
    return ", ".join(variants)


def matmul_variants() -> list[str]:
    """The matmuls that this machine can run, by their names for UNIRL_CPU_MATMULS.

    ``panels`` are ours; ``brgemm`` is that of the torch that is loaded, on AMX tiles where the machine has them. Behind
    that the arithmetic: see ``matmul_arithmetic``.
    """
    variants: list[str] = _native().matmul_variants()
    return variants


@contextmanager
def forced_matmuls(variant: str) -> Iterator[None]:
    """Force one of ``matmul_variants``, for measurements and tests. No other thread may run a matmul meanwhile.

    Raises:
        RuntimeError: when the machine lacks it.
    """
    before, native = os.environ.get("UNIRL_CPU_MATMULS", ""), _native()
    native.force_matmuls(variant)
    try:
        yield
    finally:
        native.force_matmuls(before)


def matmuls_unavailable(dtype: torch.dtype) -> str:
    """Why this machine cannot run ``NativeMatmuls`` for a weight of this dtype; empty if it can."""
    return _native().matmuls_unavailable(dtype)


def matmul_arithmetic(dtype: torch.dtype) -> str:
    """The dtype in which ``NativeMatmuls`` multiplies if the weight has this dtype. Sums are always fp32.

    Returns:
        "bf16", to which gradients of logits are rounded, or "fp32", to which 16-bit operands are widened.
    """
    return _native().matmul_arithmetic(dtype)
