"""The tests of the emulated kernels can fail: each fault that is planted into the kernels makes one of them go red."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from tests.backends.cuda.emulated import Case, check, emulated, run
from tests.backends.cuda.emulator.build import load
from tests.backends.cuda.emulator.faults import FOUND, HIDDEN, Fault, plant

FAULTS = (*FOUND, *HIDDEN)
CHANGE = plant(FAULTS)

CASES = (
    Case(10245, torch.float32, "aligned", in_place=True),
    Case(10245, torch.float32, "unaligned", in_place=True),
    Case(1025, torch.bfloat16, "unaligned"),
)
"""Clusters of two blocks and of one, in all that ``test_emulated`` asks of a case."""

ORDERS = (("forward", 0), ("backward", 0), ("random", 1), ("random", 2))


@pytest.fixture
def faulty() -> Iterator[ModuleType]:
    kernels = load("faults", CHANGE)
    with emulated(kernels):
        yield kernels
    kernels.plant(-1)


def complaints(kernels: ModuleType) -> Iterator[str]:
    """What is said of each case in each order, where something is."""
    for case in CASES:
        for order in ORDERS:
            kernels.schedule(*order)
            try:
                check(case, run(case))
            except (RuntimeError, AssertionError) as error:
                assert not kernels.error_is_left()
                yield str(error)


@pytest.mark.parametrize("fault", FOUND, ids=str)
def test_a_fault_is_found(fault: Fault, faulty: ModuleType) -> None:
    faulty.plant(FAULTS.index(fault))
    first = next(complaints(faulty), "nothing")
    assert re.search(fault.symptom, first), first


def test_nothing_is_found_without_a_fault(faulty: ModuleType) -> None:
    assert not list(complaints(faulty))


@pytest.mark.parametrize("fault", HIDDEN, ids=str)
def test_what_cannot_be_found(fault: Fault, faulty: ModuleType) -> None:
    """Should the emulator learn it, the fault moves to the others."""
    faulty.plant(FAULTS.index(fault))
    assert not list(complaints(faulty))
