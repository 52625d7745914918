"""A head whose parameters are sharded over processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.distributed.rank import WORLD


def test_sharded_parameters(tmp_path: Path) -> None:
    """Two processes with FSDP2: loss and gradients are those of one process; a sharded parameter itself is refused."""
    command = [sys.executable, "-m", "tests.distributed.rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * WORLD, "\n".join(outputs)
