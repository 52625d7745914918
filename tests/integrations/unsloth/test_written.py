"""Trainers that unsloth writes run on these kernels, written before or after the patch; GRPO trains alike."""

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


def run(program: str, argument: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tests.integrations.unsloth.{program}", argument]
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder / "written"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_grpo_trains_as_with_its_own_scores(tmp_path: Path) -> None:
    found = run("written_grpo", "model", tmp_path)
    assert found["trainer"] == "UnslothGRPOTrainer"
    assert found["calls"] == ["entropy", "logp"]
    assert found["wrong"] == []
    for key in ("loss", "grad_norm", "kl", "rewards/vowels/std"):
        assert any(log.get(key, 0.0) != 0 for log in found["log"]), key
    for name in ("grad_norm of step 1", "parameters"):
        assert any(line.startswith(name) for line in found["faulty"]), found["faulty"]


def test_written_before_and_after_the_patch(tmp_path: Path) -> None:
    own, *patched = (run("written", when, tmp_path) for when in ("never", "before", "after"))
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
