"""The decorator of every kernel of this backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for a kernel that is compiled once for all values and alignments of its run-time arguments.

    By default Triton compiles again when an integer becomes 1 or is no longer a multiple of 16, as L and T do from
    batch to batch, and when the alignment of a tensor changes. Here only a new value of a ``tl.constexpr`` compiles
    again.
    """
    parameters = inspect.signature(function).parameters.values()
    at_run_time = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=at_run_time)(function)
