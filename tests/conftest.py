"""Fixtures of all tests. Without a GPU, Triton's interpreter runs its kernels: set before Triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest

from tests.backends.cuda.emulated import emulated
from tests.backends.cuda.emulator.build import load
from tests.runners import DEVICES, RUNNERS, Runner


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a ``slow_interpreted`` test as ``slow`` if Triton's interpreter runs its kernels."""
    for item in items:
        runner = getattr(item, "callspec", None) and item.callspec.params.get("runner")  # type: ignore[attr-defined]
        if item.get_closest_marker("slow_interpreted") and runner.interpreted:
            item.add_marker("slow")


@pytest.fixture(params=RUNNERS, ids=str)
def runner(request: pytest.FixtureRequest) -> Runner:
    """Each backend, kernel and device of this machine. A missing backend is an error, not a skip."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine, with its default backend."""
    return request.param


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the CUDA backend in the emulator if the test has an emulated runner."""
    runner = getattr(request.node, "callspec", None) and request.node.callspec.params.get("runner")
    if not (isinstance(runner, Runner) and runner.emulated):
        yield
        return
    kernels = load("kernels")
    kernels.schedule("random", 0)
    with emulated(kernels):
        yield


@pytest.fixture(autouse=True)
def _narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies have several tiles, too."""
    monkeypatch.setattr("unirl_kernels.head.statistics.LEAST_COLUMNS", 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
