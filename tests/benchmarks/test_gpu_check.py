"""``benchmarks/gpu-check``: what it runs, keeps and says, tried on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.record import Record
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu-check"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its commands are those of GNU")


def gpu_check(
    out: Path, *steps: str, python: str = sys.executable, limit: int = 300
) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), python, str(out), *steps]
    environment = os.environ | {"DRY_RUN": "1", "LIMIT": str(limit)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def records_of(out: Path) -> Path:
    with tarfile.open(out / "records.tgz") as packed:
        packed.extractall(out, filter="data")
    return out / "records"


def test_every_step(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "build", "doctor", "tests", "bench", "sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "ok"] for name in ("build", "doctor", "tests-cpu", "bench", "memcheck-cpu")
    ]
    assert " passed in " in lines[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.tgz", "summary.txt"]
    records = records_of(tmp_path)
    assert 'tests="1"' in (records / "tests-cpu.xml").read_text()
    works = [run.work for file in records.glob("*.json") for run in Record.load(file).runs]
    assert len(works) == 9
    assert {work.mode for work in works} == {"fused", "stats", "forward-backward"}
    assert {work.tokens for work in works if work.hidden is None} == {64, 65}


@pytest.mark.parametrize(
    ("body", "limit", "said"),
    [("exit 7", 60, "failed, exit 7"), ("sleep 60", 6, "not finished"), ("exit 0", 4, "not started")],
)
def test_what_is_not_done_is_no_success(tmp_path: Path, body: str, limit: int, said: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho FAILED made up\n{body}\n")
    python.chmod(0o755)
    done = gpu_check(tmp_path / "out", "doctor", python=str(python), limit=limit)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert said in summary
    assert (tmp_path / "out" / "records.tgz").stat().st_size
    if said != "not started":
        assert "FAILED made up" in summary
        assert (records_of(tmp_path / "out") / "doctor.log").read_text() == "FAILED made up\n"


def test_a_step_that_there_is_not(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "dance")
    assert (done.returncode, done.stderr) == (2, "gpu-check: no step dance\n")
