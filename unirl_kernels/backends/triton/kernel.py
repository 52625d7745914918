"""What every kernel of this backend has in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for a kernel that is compiled once for all values and alignments of its run-time arguments.

    Left alone, Triton compiles anew when an integer becomes 1 or ceases to be a multiple of 16, as L and T do from
    batch to batch, and when a tensor starts elsewhere. Only what is declared ``tl.constexpr`` makes another kernel.
    """
    parameters = inspect.signature(function).parameters.values()
    at_run_time = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=at_run_time)(function)
