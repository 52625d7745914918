"""What was derived from an objective of your own: its coefficient, the generated function, where it runs."""

from __future__ import annotations

import argparse
import sys

from unirl_kernels.commands.cli import CommandFailed
from unirl_kernels.commands.user_file import load
from unirl_kernels.explain import explain
from unirl_kernels.objectives import Loss, PairMean, SequenceMean

HELP = "what was derived from an objective in a Python file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "objective",
        metavar="FILE.py:OBJECTIVE",
        help="a function of t, an instance of a class that is called with t (or the class, if it needs no arguments), "
        "or a Loss",
    )


def run(options: argparse.Namespace) -> int:
    found = load(options.objective, "objective")
    try:
        loss = loss_of(found)
    except Exception as error:  # the file's own code runs here
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CommandFailed(f"objective {options.objective}: {said}") from error
    sys.stdout.write(f"{explain(loss)}\n")
    return 0


def loss_of(found: object) -> Loss:
    """The loss of an objective: its mean over sequences, or over pairs if the objective is one of pairs."""
    if isinstance(found, Loss):
        return found
    objective = found() if isinstance(found, type) else found
    paired = getattr(objective, "scope", "token") == "pair"
    return Loss(objective, PairMean() if paired else SequenceMean())  # type: ignore[arg-type]
