"""``python -m tests.fuzz --seconds 600`` searches; ``python -m tests.fuzz --seed 0 --case 17`` runs one case again."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.case import INSTRUCTION_SETS, instruction_set, make
from tests.fuzz.search import Outcome, numbers_of, search, start


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Search for wrong values with random cases.")
    parser.add_argument("--seconds", type=float, default=60, help="how long; each process finishes its case")
    parser.add_argument("--cases", type=int, default=10**9, help="at most so many on each instruction set")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone and say what it is")
    parser.add_argument("--skip", choices=("cpu", "eager", "triton"), help="leave out the cases of a backend")
    parser.add_argument("--isa", nargs="+", choices=INSTRUCTION_SETS, default=INSTRUCTION_SETS, help="instruction sets")
    parser.add_argument("--worker", choices=INSTRUCTION_SETS, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        return again(given.seed, given.case)
    if given.worker:
        numbers = numbers_of(given.worker, given.first)
        search(given.seed, numbers, given.seconds, given.cases, given.progress, given.skip)
        return 0
    return searched(given)


def again(seed: int, number: int) -> int:
    """Run one case, on its own instruction set."""
    os.environ.setdefault("UNIRL_CPU_ISA", instruction_set(number))
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.fuzz.run import described, run

    case = make(seed, number)
    print(described(case))
    problems = run(case).problems
    print("\n".join(problems) or "nothing is wrong with it")
    return bool(problems)


def searched(given: argparse.Namespace) -> int:
    """Search on each instruction set and say what was found."""
    arguments = [f"--{name}={getattr(given, name)}" for name in ("seconds", "cases", "seed", "first")]
    arguments += [f"--skip={given.skip}"] if given.skip else []
    began, total = time.monotonic(), Outcome()
    with tempfile.TemporaryDirectory() as folder:
        workers = [start(name, arguments, Path(folder)) for name in given.isa]
        for worker in workers:
            outcome = worker.outcome()
            note = f"not run: {outcome.unavailable}" if outcome.unavailable else f"next is {outcome.next}"
            print(f"{worker.instruction_set}: {outcome.cases.total()} cases, {len(outcome.found)} wrong; {note}")
            total.add(outcome)
    seconds = time.monotonic() - began
    counts = ", ".join(f"{k} {n}" for k, n in sorted(total.cases.items()))
    print(f"{total.cases.total()} cases in {seconds:.0f} s: {counts}")
    print(f"{total.compared} elements compared with fp64, {total.undecided} left open; {len(total.found)} wrong cases")
    for number, problems in sorted(total.found.items()):
        print(f"\npython -m tests.fuzz --seed {given.seed} --case {number}", *problems[:6], sep="\n    ")
    return bool(total.found)


if __name__ == "__main__":
    sys.exit(main())
