"""Providers: the kernels and peers of a comparison, and how they are bound to a piece of work."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType

import torch

from benchmarks.imports import imported, undisturbed
from benchmarks.inputs import Inputs, Values
from benchmarks.record import key
from benchmarks.work import FUSED, Work
from unirl_kernels import backends

Function = Callable[..., Values]
"""A function from the operands of the level to the result of the mode: the loss, or log-probability and entropy."""

Bind = Callable[[Inputs], Function]
"""Makes the function for given inputs; raises ``Skipped`` if there is none."""

Prepare = Callable[[torch.device], object]
"""Does what takes long once per process."""

OURS = "unirl_kernels"


class Skipped(Exception):
    """A provider is not measured; the message says why."""


@dataclass(frozen=True)
class Provider:
    """A kernel or peer in a comparison.

    Args:
        name: whose it is, as ``--peers`` spells it.
        kernel: which of theirs.
        bind: makes the function.
        overwrites: the gradient comes into the operand's memory.
        source: ``FILE.py:FUNCTION`` where it is the user's own, see ``own``; else empty.
        prepare: what takes long once per process, whatever the work; called with the device.
    """

    name: str
    kernel: str
    bind: Bind
    overwrites: bool = False
    source: str = ""
    prepare: Prepare | None = None

    @property
    def key(self) -> str:
        """The name of the provider among all providers."""
        return key(self.name, self.kernel, self.overwrites)


def prepare(providers: Iterable[Provider], device: torch.device) -> None:
    """Do what takes long once per process."""
    with undisturbed():
        for step in dict.fromkeys(p.prepare for p in providers if p.prepare):
            with suppress(Exception):  # whoever binds the provider says so
                step(device)
    gc.freeze()  # else the process's end looks for garbage in all that was imported, for two seconds


def needs(module: str, pip: str) -> ModuleType:
    """Import a peer's module, or skip the peer."""
    try:
        return imported(module)
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        if missing == module.split(".")[0]:
            raise Skipped(f"not installed: pip install {pip}") from error
        raise Skipped(f"cannot be imported: {str(error).splitlines()[0]}") from error


def needs_gpu(work: Work) -> None:
    if torch.device(work.device).type != "cuda":
        raise Skipped("runs on a GPU only")


def needs_backend(work: Work, backend: str) -> None:
    if reason := backends.unavailable(backend, torch.device(work.device)):
        raise Skipped(reason)
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        raise Skipped("interpreted: its time would mean nothing")


def needs_loss(work: Work, *losses: str) -> None:
    if work.mode != FUSED:
        raise Skipped("computes losses only, no statistics")
    if work.loss not in losses:
        raise Skipped(f"computes {' and '.join(losses)} only")
