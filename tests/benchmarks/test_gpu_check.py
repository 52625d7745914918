"""``benchmarks/gpu-check``: what it runs, keeps and says, tried on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.record import Record
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu-check"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its commands are those of GNU")


def gpu_check(
    out: Path, *steps: str, python: str = sys.executable, limit: int = 570, wheels: str = "none", geometries: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), python, str(out), *steps]
    settings = {"DRY_RUN": "1", "LIMIT": str(limit), "WHEELS": wheels, "GEOMETRIES": geometries}
    environment = os.environ | settings
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def records_of(out: Path) -> Path:
    with tarfile.open(out / "records.tgz") as packed:
        packed.extractall(out, filter="data")
    return out / "records"


STEPS = ("build", "doctor", "repeat", "ceilings", "bench", "tests", "heads", "peers", "sanitize", "profile")
OTHERS = ("sweep", "rest")


def test_first_steps(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "build", "doctor", "repeat", "ceilings", "profile", "rest")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split()[:2] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    ran = [[name, "ok"] for name in ("build", "doctor", "repeat", "ceilings", "profiled")]
    assert lines == [*ran, ["profile", "skipped:"], ["rest", "skipped:"]]
    assert (records_of(tmp_path) / "ceilings.json").exists()
    assert "triton/split_row V=2049 in place" in (records_of(tmp_path) / "repeat.log").read_text()


@pytest.mark.slow
def test_every_step(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, *STEPS, *OTHERS, geometries="max_warps=4;held_elements=128 split_max_warps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        *([name, "ok"] for name in ("build", "doctor", "repeat", "ceilings", "bench", "tests-cpu", "heads", "peers")),
        *([name, "ok"] for name in ("memcheck-cpu", "profiled")),
        ["profile", "skipped:"],
        *([name, "ok"] for name in ("sweep-0", "sweep-1")),
        ["rest", "skipped:"],
    ]
    assert " passed in " in lines[5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.tgz", "summary.txt"]
    records = records_of(tmp_path)
    assert 'tests="1"' in (records / "tests-cpu.xml").read_text()
    assert set(json.loads((records / "ceilings.json").read_text())["per_second"]) == {"copy", "read", "mm into bf16"}
    assert (records / "sweep-1" / "geometry.txt").read_text() == "held_elements=128 split_max_warps=2\n"
    files = [file for file in records.rglob("*.json") if file.stem != "ceilings"]
    works = [run.work for file in files for run in Record.load(file).runs]
    of_logits, of_heads, of_peers, of_sweeps = 3 * 2, 3, 3 * 2 + 2, 2 * 2
    assert len(works) == of_logits + of_heads + of_peers + of_sweeps
    assert {work.mode for work in works} == {"fused", "stats", "forward-backward"}
    assert {work.tokens for work in works if work.hidden is None} == {64, 65}


ALONE = """
import sys
for name in ("numpy", "rich", "pytest", "matplotlib", "hypothesis"):
    sys.modules[name] = None
import benchmarks.ceilings, benchmarks.profiled, benchmarks.sanitized, benchmarks.suite
sys.argv = ["suite", sys.argv[1], "logits", "--modes", "fused", "--kernels", "cpu", "--small"]
sys.exit(benchmarks.suite.main())
"""


def test_a_bench_needs_torch_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_wheels_are_used(tmp_path: Path) -> None:
    """A wheel that is installed nowhere, and what it says when it is imported."""
    name, wheels = "made_up_peer-1.0", tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up_peer.py", "print('FAILED imported')\n")
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up-peer\nVersion: 1.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    python = tmp_path / "python"
    doctor = f'[ $2 = unirl_kernels ] && set -- -c "import made_up_peer"\nexec {sys.executable} "$@"\n'
    python.write_text(f"#!/bin/sh\n{doctor}")
    python.chmod(0o755)
    gpu_check(tmp_path / "out", "doctor", python=str(python), limit=120, wheels=str(wheels))
    assert "FAILED imported" in (tmp_path / "out" / "summary.txt").read_text()


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


ENDS_ONCE = """
for last; do :; done
case "$*" in *benchmarks.suite*) ;; *) exit 1 ;; esac
[ -e {once} ] && exit 0
touch {once}
echo WRONG made up
exit 3
"""


def test_the_suite_goes_on_after_a_kernel_has_ended_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + ENDS_ONCE.format(once=tmp_path / "once"))
    python.chmod(0o755)
    done = gpu_check(tmp_path / "out", "bench", python=str(python), limit=60)
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["bench", "failed,"], ["WRONG", "made"], ["bench-2", "ok"]]
    assert done.returncode == 1


def test_a_step_that_there_is_not(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, "dance")
    assert (done.returncode, done.stderr) == (2, "gpu-check: no step dance\n")
