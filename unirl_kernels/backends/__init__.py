"""The table of backends, and the choice among them.

A backend is a module with the functions of ``Backend``, loaded when first used. ``groups`` has their arguments and
results.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from unirl_kernels.backends.groups import (
    FusedRows,
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
)
from unirl_kernels.backends.matmuls import Matmuls


class Backend(Protocol):
    """The functions of a backend module."""

    KERNELS: tuple[str, ...]
    """Names of its one-pass kernels."""

    def unavailable(self, device: torch.device) -> str | None:
        """None, or the reason why it cannot run there."""

    def kernels_by_vocab(self, device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        """The default kernels, each with the longest row that it takes."""

    def token_stats(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
        """Statistics and moments of each row, in one read of the logits."""

    def token_observations(self, logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed:
        """The same, and observations of each row, from the same read."""

    def token_stats_backward(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        moments: RowMoments,
        gradients: RowGradients,
        d_logits: Tensor,
    ) -> None:
        """Write the gradient of the logits, in one read and one write; ``d_logits`` may be the logits themselves."""

    def fused_loss(
        self,
        logits: Tensor,
        target: Tensor,
        readout: ReadoutArgs,
        program: ProgramArgs,
        d_logits: Tensor,
        kernel: str,
    ) -> FusedRows:
        """Statistics, objective and gradient of each row, in one read and one write, into ``d_logits`` as above."""

    def matmuls(self, weight: Tensor, dtype: torch.dtype) -> Matmuls:
        """The matmuls of a linear head's weight, [V, D], with operands in ``dtype``."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised memory for a tensor of the vocabulary's size."""

    def release_memory(self) -> int:
        """Free the memory that ``empty`` keeps for reuse, and return the number of bytes."""

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        """Multiply a gradient by a scalar; free if the scalar is 1."""


MODULES = {
    "cpu": f"{__name__}.cpu",
    "triton": f"{__name__}.triton",
    "cuda": f"{__name__}.cuda",
    "eager": f"{__name__}.eager",
}
"""Backends in the order of preference."""

COMPOSED = "composed"
"""The kernel that every backend has: statistics, then the objective under autograd, then the gradient."""


@cache
def load(name: str) -> Backend:
    """The module of a backend.

    Raises:
        ValueError: when there is no backend of that name.
    """
    if name not in MODULES:
        raise ValueError(f"backend must be one of {', '.join(MODULES)}, got {name!r}")
    return cast(Backend, importlib.import_module(MODULES[name]))


def unavailable(name: str, device: torch.device) -> str | None:
    """None when the backend runs on ``device``, else the reason why not."""
    return load(name).unavailable(device)


class Choice(NamedTuple):
    backend: str
    kernel: str


INSTEAD = {("triton", "split_row"): Choice("cuda", "cluster")}
"""Default kernels that another backend's kernel replaces. Both read a row once; the other one is predicted to be faster
and waits for no other program."""


def choose(device: torch.device, backend: str | None, kernel: str | None) -> Choice:
    """The backend and kernel to use on ``device``: the named ones, else the best backend and the first of its kernels.

    Raises:
        ValueError: when there is no backend or kernel of that name.
        RuntimeError: when the named backend cannot run there, with the reason.
    """
    if backend is None:
        backend = _best(device)
    elif reason := unavailable(backend, device):
        raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}")
    kernels = (*load(backend).KERNELS, COMPOSED)
    if kernel is not None and kernel not in kernels:
        raise ValueError(f"kernel of backend {backend!r} must be one of {', '.join(kernels)}, got {kernel!r}")
    return Choice(backend, kernel or kernels[0])


def choices_by_vocab(
    device: torch.device, backend: str | None, kernel: str | None, dtype: torch.dtype
) -> tuple[tuple[Choice, int], ...]:
    """The one-pass kernels for ``device``, each with the longest row that it takes: the named ones, else the defaults
    of the best backend for logits of ``dtype``.

    Raises:
        ValueError, RuntimeError: as ``choose`` does.
    """
    named = choose(device, backend, kernel)
    if kernel is not None:
        return ((named, sys.maxsize),)
    return _by_vocab(device, named.backend, dtype, backend is None)


@cache
def _by_vocab(device: torch.device, backend: str, dtype: torch.dtype, others: bool) -> tuple[tuple[Choice, int], ...]:
    """A backend's kernels. A better kernel of another backend (``INSTEAD``) comes first, if that backend runs."""
    found: list[tuple[Choice, int]] = []
    for name, most in load(backend).kernels_by_vocab(device, dtype):
        other = INSTEAD.get((backend, name)) if others else None
        if other is not None and unavailable(other.backend, device) is None:
            found.append((other, dict(load(other.backend).kernels_by_vocab(device, dtype))[other.kernel]))
        found.append((Choice(backend, name), most))
    found[-1] = found[-1][0], sys.maxsize  # the last one takes all longer rows, or raises with the reason
    return tuple(found)


def told(choices: Sequence[tuple[Choice, int]]) -> str:
    """``choices_by_vocab`` as text."""
    texts: list[str] = []
    reached = 0
    for choice, most in choices:
        end = " beyond" if texts and most == sys.maxsize else "" if most == sys.maxsize else f" up to V = {most}"
        if most > reached:
            texts.append(f"{choice.backend} {choice.kernel}{end}")
        reached = max(reached, most)
    return ", ".join(texts)


# Set by hand what torch.compiler.assume_constant_result sets: calling it imports torch.compile, 1.2 s. Callers read the
# fields of the result, since torch.compile of torch 2.11 cannot unpack such a constant.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
choices_by_vocab._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _best(device: torch.device) -> str:
    """The first backend of the table that runs on ``device``. A slow one gives a warning."""
    reasons = {}
    for name in MODULES:
        reason = unavailable(name, device)
        if reason is None:
            break
        reasons[name] = reason
    if name == "eager" and device.type != "meta":
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        warnings.warn(f"unirl_kernels takes the slow backend 'eager' on {device} ({why})", RuntimeWarning, stacklevel=4)
    return name
