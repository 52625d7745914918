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
from tests.places import DEVICES, PLACES, Place


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``slow_interpreted`` becomes ``slow`` where Triton's interpreter runs the kernels."""
    for item in items:
        place = getattr(item, "callspec", None) and item.callspec.params.get("place")  # type: ignore[attr-defined]
        if item.get_closest_marker("slow_interpreted") and place.interpreted:
            item.add_marker("slow")


@pytest.fixture(params=PLACES, ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend with every kernel on every device of this machine; a missing one is an error, not a skip."""
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, with the backend that is chosen there."""
    return request.param


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CUDA backend runs on the CPU in tests of a place that says so."""
    place = getattr(request.node, "callspec", None) and request.node.callspec.params.get("place")
    if not (isinstance(place, Place) and place.emulated):
        yield
        return
    kernels = load("kernels")
    kernels.schedule("random", 0)
    with emulated(kernels):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
