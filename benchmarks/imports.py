"""Imports of large packages."""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: it finds nothing in half-imported packages, and takes 15 % of the time of torch's,
    TRL's and torch.compile's."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without the collector and without warnings."""
    with uncollected(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def imported(module: str) -> ModuleType:
    with undisturbed():
        return importlib.import_module(module)
