"""The search itself: some cases in every run of the tests, and faults that it has to find."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.case import INSTRUCTION_SETS, make
from tests.fuzz.run import run
from tests.fuzz.search import start

CASES = 120
"""On each instruction set."""


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_cases(instruction_set: str, tmp_path: Path) -> None:
    outcome = start(instruction_set, ["--seconds=600", f"--cases={CASES}"], tmp_path).outcome()
    if outcome.unavailable:
        pytest.skip(outcome.unavailable)
    assert not outcome.found, f"run one again with python -m tests.fuzz --case NUMBER: {outcome.found}"
    assert outcome.cases.total() == CASES
    assert outcome.undecided <= outcome.compared / 20, "the search asks for too little"


def test_under_the_interpreter() -> None:
    """Cases of a backend that is rare among the others, since it is slow here."""
    cases = [case for case in (make(1, k) for k in range(4000)) if case.backend == "triton"]
    for case in cases[:4]:
        assert not run(case).problems, f"python -m tests.fuzz --seed 1 --case {case.number}"
