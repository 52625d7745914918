"""Runs a module of tests as one process per rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import ROOT


def run_ranks(module: str, world: int, store: Path, *arguments: str) -> None:
    """``python -m MODULE RANK STORE`` for each rank, side by side.

    Args:
        module: what to run.
        world: how many processes.
        store: a file that does not exist yet, by which they find one another.
        arguments: more of the command.

    Raises:
        AssertionError: with the output of all, when one fails.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(store), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)
