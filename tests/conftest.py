"""Where the tests run: the interpreter stands in for a GPU, and has to be switched on before Triton is imported."""

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
    """``slow_interpreted`` becomes ``slow`` where Triton's interpreter runs the kernels."""
    for item in items:
        runner = getattr(item, "callspec", None) and item.callspec.params.get("runner")  # type: ignore[attr-defined]
        if item.get_closest_marker("slow_interpreted") and runner.interpreted:
            item.add_marker("slow")


@pytest.fixture(params=RUNNERS, ids=str)
def runner(request: pytest.FixtureRequest) -> Runner:
    """Every backend with every kernel on every device of this machine; a missing one is an error, not a skip."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, with the backend that is chosen there."""
    return request.param


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CUDA backend runs on the CPU in tests of a runner that says so."""
    runner = getattr(request.node, "callspec", None) and request.node.callspec.params.get("runner")
    if not (isinstance(runner, Runner) and runner.emulated):
        yield
        return
    kernels = load("kernels")
    kernels.schedule("random", 0)
    with emulated(kernels):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
