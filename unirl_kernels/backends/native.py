"""The native extensions (``csrc``), with the functions of a backend."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from unirl_kernels.backends.groups import (
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

PACKAGE = __name__.split(".")[0]


def extension(name: str = "_C") -> ModuleType:
    """A native extension: ``_C`` with the CPU kernels, or ``_cuda``.

    Raises:
        ImportError: when it is not built, or does not load: with a torch that lacks DLPack's exchange functions, or
            without the libraries that it needs.
    """
    if importlib.util.find_spec(f"{PACKAGE}.{name}") is None:
        raise ImportError("the native extension is not built")
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ImportError as error:
        raise ImportError(f"the native extension does not load ({error})") from error


class RowKernels:
    """Statistics, observations, their gradient and losses of rows, by a native extension.

    Args:
        part: returns the extension. It is called at each use, so that a backend can be imported if its extension does
            not load.
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
