"""verl's engine as a fixture, on a CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks.verl_engine import ENGINE, LOSSES, Engine, loaded
from tests.integrations.verl.modules import INSTALL
from unirl_kernels.integrations import verl as ours


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    if importlib.util.find_spec("verl") is None:
        pytest.skip(f"verl is not installed: {INSTALL}")
    for name, module in loaded().items():
        monkeypatch.setitem(sys.modules, name, module)
    implementation = sys.modules[ENGINE]
    monkeypatch.setattr(implementation, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(implementation, "get_device_name", lambda: "cpu")
    yield Engine(implementation, sys.modules[LOSSES])
    ours.unpatch()


@contextmanager
def as_in(dtype: torch.dtype) -> Iterator[None]:
    """With another default dtype, in which a model is made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
