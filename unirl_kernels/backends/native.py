"""What ``csrc`` is compiled to, behind the functions that a backend offers."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

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
    measured_like,
    observed_like,
    rows_like,
)
from unirl_kernels.batch import IGNORE

EXTENSION = f"{__name__.split('.')[0]}._C"


def extension() -> ModuleType:
    """The native extension.

    Raises:
        ImportError: when it is not built, was built with another torch, or does not load.
    """
    found = importlib.util.find_spec(EXTENSION)
    if found is None or found.origin is None:
        raise ImportError("the native extension is not built")
    _check_torch(Path(found.origin))
    try:
        return importlib.import_module(EXTENSION)
    except ImportError as error:
        raise ImportError(f"the native extension does not load ({error})") from error


BUILT_WITH = re.compile(rb"unirl_kernels built with torch (\d+\.\d+[\w.]*)")


@cache
def _check_torch(library: Path) -> None:
    """Raise unless the extension was built with the torch that is installed, but for its last number.

    It calls torch's C++ functions, which change from release to release: with another it does not load or, where names
    have stayed and layouts have not, reads other memory.
    """
    found = BUILT_WITH.search(library.read_bytes())
    built = found[1].decode() if found else "unknown"
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"the native extension was built with torch {built}, and torch {torch.__version__} is installed: install "
            "unirl_kernels anew, so that it is built with this torch"
        )


class RowKernels:
    """Statistics, observations, their gradient and losses of rows, by one part of the extension.

    Args:
        part: gives that part; asked at each call, so that a backend can be imported where it does not load.
    """

    def __init__(self, part: Callable[[], ModuleType]) -> None:
        self._part = part

    def token_stats(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        measured = measured_like(target, logits.dtype)
        self._part().token_stats(logits, target, IGNORE, readout, measured)
        return measured

    def token_observations(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed:
        observed = observed_like(target, logits.dtype)
        self._part().token_observations(logits, target, IGNORE, readout, observed)
        return observed

    def token_stats_backward(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        moments: RowMoments,
        gradients: RowGradients,
        d_logits: Tensor,
    ) -> None:
        self._part().token_stats_backward(logits, target, IGNORE, readout, moments, gradients, d_logits)

    def fused_loss(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        program: ProgramArgs,
        d_logits: Tensor,
        kernel: str,
    ) -> FusedRows:
        rows = FusedRows._make(rows_like(target, logits.dtype, len(FusedRows._fields)))
        self._part().fused_loss(logits, target, IGNORE, readout, program, d_logits, rows)
        return rows
