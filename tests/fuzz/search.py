"""Cases one after another, in a process for each instruction set."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.case import INSTRUCTION_SETS

ROOT = Path(__file__).parents[2]
MAX_FOUND = 20
"""Cases that are reported of a process."""


@dataclass
class Outcome:
    """What a process found.

    Args:
        cases: how many it ran, by level and backend.
        found: number of a case -> what is wrong with it.
        compared, undecided: elements, see ``Findings``.
        next: the case that would be next; where the process died, the one that it was at.
    """

    cases: Counter[str] = field(default_factory=Counter)
    found: dict[int, list[str]] = field(default_factory=dict)
    compared: int = 0
    undecided: int = 0
    next: int = 0
    unavailable: str = ""  # why the instruction set cannot run here

    def add(self, other: Outcome) -> None:
        self.cases += other.cases
        self.found |= other.found
        self.compared += other.compared
        self.undecided += other.undecided


def numbers_of(instruction_set: str, first: int) -> Iterator[int]:
    """Cases from a number on that run on an instruction set."""
    n = len(INSTRUCTION_SETS)
    return itertools.count(first + (INSTRUCTION_SETS.index(instruction_set) - first) % n, n)


def search(
    seed: int,
    numbers: Iterator[int],
    seconds: float,
    cases: int,
    progress: Path | None = None,
    skip: str | None = None,
) -> Outcome:
    """Run cases in this process.

    Args:
        seed, numbers: which.
        seconds: after so many no further case is begun.
        cases: nor after so many cases.
        progress: a file that gets the outcome before each case, so that it is known where a process died.
        skip: a backend whose cases are left out.
    """
    import torch

    from tests.fuzz.case import make
    from tests.fuzz.run import run
    from unirl_kernels.backends import cpu

    outcome, end = Outcome(unavailable=cpu.unavailable(torch.device("cpu")) or ""), time.monotonic() + seconds
    kept = (number for number in numbers if make(seed, number).backend != skip)
    for number in itertools.islice(kept, cases):
        outcome.next = number
        if progress is not None:
            progress.write_text(json.dumps(vars(outcome)))
        if outcome.unavailable or time.monotonic() >= end or len(outcome.found) >= MAX_FOUND:
            break
        case = make(seed, number)
        findings = run(case)
        outcome.cases[f"{case.level} {case.backend}"] += 1
        outcome.compared += findings.compared
        outcome.undecided += findings.undecided
        if findings.problems:
            outcome.found[number] = findings.problems
    if progress is not None:
        progress.write_text(json.dumps(vars(outcome)))
    return outcome


@dataclass
class Worker:
    """A process that searches on one instruction set."""

    instruction_set: str
    process: subprocess.Popen[str]
    progress: Path

    def outcome(self) -> Outcome:
        """Wait for it. Where it died, the case that it was at is wrong.

        Raises:
            RuntimeError: when it did not get as far as a case.
        """
        errors = self.process.communicate()[1]
        if not self.progress.exists():
            raise RuntimeError(f"the process of {self.instruction_set} ended before its first case:\n{errors[-2000:]}")
        found = json.loads(self.progress.read_text())
        cases = {int(number): problems for number, problems in found.pop("found").items()}
        outcome = Outcome(Counter(found.pop("cases")), cases, **found)
        if self.process.returncode:
            outcome.found[outcome.next] = [f"the process died, {self.process.returncode}: {errors[-600:]}"]
        return outcome


def start(instruction_set: str, arguments: list[str], folder: Path) -> Worker:
    """A process of ``python -m tests.fuzz --worker`` on an instruction set."""
    progress = folder / f"{instruction_set}.json"
    command = [sys.executable, "-m", "tests.fuzz", "--worker", instruction_set, "--progress", str(progress), *arguments]
    environment = os.environ | {"UNIRL_CPU_ISA": instruction_set, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return Worker(instruction_set, process, progress)
