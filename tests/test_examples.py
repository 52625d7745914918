"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_own_objective_learns() -> None:
    command = [sys.executable, str(EXAMPLES / "own_objective.py"), "--steps", "30"]
    where = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=where)
    assert result.returncode == 0, result.stderr
    assert "GC = " in result.stdout
    learnt = [float(reward) for reward in re.findall(r"reward (\S+)", result.stdout)]
    assert learnt[0] < 0.5 < 0.8 < learnt[-1], result.stdout
