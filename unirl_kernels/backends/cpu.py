"""The CPU backend: native kernels (``csrc``), one read and one write of the logits, any x86-64 or ARM machine.

Environment, read when the backend is first used:
    UNIRL_CPU_ISA           avx512, avx2 or baseline: the instruction set, instead of the widest that the machine has
    UNIRL_CPU_MATMULS       panels-fp32, panels-bf16, brgemm-fp32 or brgemm-bf16: how matmuls of bf16 operands run, and
                            other operands in fp32 by the same means, instead of what the table of cores says
    UNIRL_CPU_CACHE_BYTES   most bytes of freed gradients to keep for reuse, see ``empty``; 0 keeps none
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
"""Most bytes of freed gradients that are kept where UNIRL_CPU_CACHE_BYTES does not say."""


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
    """The extension, with what the environment says applied.

    Raises:
        ImportError: when the extension is not built.
        RuntimeError, ValueError: when the environment asks for what cannot be.
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
    return int(text)


_rows = RowKernels(_native)
token_stats, token_stats_backward, fused_loss = _rows.token_stats, _rows.token_stats_backward, _rows.fused_loss
token_observations = _rows.token_observations


def matmuls(weight: Tensor, dtype: torch.dtype) -> Matmuls:
    return torch_defaults.matmuls(weight, dtype) if matmuls_unavailable(dtype) else NativeMatmuls(weight.to(dtype))


@dataclass(frozen=True, eq=False)
class NativeMatmuls(Matmuls):
    """Matmuls of ``csrc/cpu``, in one of ``matmul_ways``.

    The bits of a row depend on neither the other rows nor the number of threads.

    Operands are float32, bfloat16 or float16, all the same, with any strides; the bias has any floating dtype. Results
    are float32, with any row stride. Gradients of logits are float32 with any strides, and rounded to bf16 where
    ``matmul_arithmetic`` says so. Anything else is a ValueError.
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
    """Uninitialised contiguous memory for a gradient, or for anything else of the vocabulary's size.

    Fresh memory from the system costs more than the whole loss, for it is zeroed page by page at the first touch
    (benchmarks/NOTES.md has figures). Gradients of 2 MiB and more therefore lie on huge pages, and freed ones are kept
    for the next that fits: at most ``UNIRL_CPU_CACHE_BYTES`` in all (default 2 GiB), the longest kept going first.
    Nothing is kept on top of new memory: when no kept gradient is large enough, all of them go back to the system
    before more is taken. ``release_memory`` gives them back at once.
    """
    return _native().empty(shape, dtype)


def release_memory() -> int:
    """Give the freed gradients that are kept for reuse back to the system.

    Returns:
        Bytes given back.
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
    """What runs here, in words, for ``python -m unirl_kernels doctor``.

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
    ways = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if reason := native.matmuls_unavailable(dtype):
            return f"torch's own: {reason}"
        ways.append(f"{str(dtype).removeprefix('torch.')} by {native.matmul_way(dtype)}")
    return ", ".join(ways)


def matmul_ways() -> list[str]:
    """The ways to multiply that this machine has, as UNIRL_CPU_MATMULS takes them.

    ``panels`` are ours; ``brgemm`` is that of the torch that is loaded, on AMX tiles where the machine has them. Behind
    that the arithmetic: see ``matmul_arithmetic``.
    """
    ways: list[str] = _native().matmul_ways()
    return ways


@contextmanager
def forced_matmuls(way: str) -> Iterator[None]:
    """Multiply in a way of ``matmul_ways``, for measurements and tests; no other thread may be multiplying.

    Raises:
        RuntimeError: when the machine lacks it.
    """
    before, native = os.environ.get("UNIRL_CPU_MATMULS", ""), _native()
    native.force_matmuls(way)
    try:
        yield
    finally:
        native.force_matmuls(before)


def matmuls_unavailable(dtype: torch.dtype) -> str:
    """Why this machine does not run ``NativeMatmuls`` of a weight of this dtype; empty where it does."""
    return _native().matmuls_unavailable(dtype)


def matmul_arithmetic(dtype: torch.dtype) -> str:
    """What ``NativeMatmuls`` multiplies where the weight has this dtype; sums are fp32 in any case.

    Returns:
        "bf16", to which gradients of logits are rounded, or "fp32", to which 16-bit operands are widened.
    """
    return _native().matmul_arithmetic(dtype)
