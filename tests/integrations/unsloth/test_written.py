"""Trainers that unsloth writes run on these kernels, whether they are written before or after the patch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("unsloth", reason="unsloth is not installed: make test-trainers")

ROOT = Path(__file__).parents[3]


def run(when: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.integrations.unsloth.written", when]
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder / when), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_written_before_and_after_the_patch(tmp_path: Path) -> None:
    own, *patched = (run(when, tmp_path) for when in ("never", "before", "after"))
    assert own["calls"] == 0
    for found in patched:
        assert found["calls"] == 2
        assert found["given_back"] == [True]
        # What is written stays in a folder that later runs read.
        assert found["source"] == own["source"]
        assert found["text"] == own["text"]
        for name, values in own["values"].items():
            a, b = (torch.tensor(x, dtype=torch.float64) for x in (found["values"][name], values))
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
            assert not torch.equal(a, b)
