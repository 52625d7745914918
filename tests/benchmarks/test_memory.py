"""Peak memory: when it is measured, and by which process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.__main__ import main
from benchmarks.measurement import Measurement
from benchmarks.providers import OURS, Provider, prepare
from benchmarks.record import Record
from benchmarks.selection import chosen
from benchmarks.work import Work
from tests import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each provider has a process of its own")
def test_memory_of_small_work_is_measured_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """While providers are checked; it is over before they are timed."""
    order: list[str] = []
    for name in ("check", "time"):
        method = getattr(Measurement, name)

        def noted(self: Measurement, *args: Any, name: str = name, method: Any = method) -> Any:
            order.append(name)
            return method(self, *args)

        monkeypatch.setattr(Measurement, name, noted)
    process = memory._Process

    class Noted(process):
        def __init__(self, *args: Any) -> None:
            order.append("start")
            super().__init__(*args)

        def ask(self, provider: Provider) -> None:
            order.append("ask")
            super().ask(provider)

        def answer(self) -> str:
            order.append("answer")
            return super().answer()

        def stop(self) -> None:
            order.append("stop")
            super().stop()

    monkeypatch.setattr(memory, "_Process", Noted)
    monkeypatch.setattr(memory, "SMALL_BYTES", 64 * 2 * 1024)
    small = ["--tokens", "64", "--peers", "none", "--kernels", "cpu/rows", "--rounds", "2"]
    assert main([*small, "--vocab", "1024"]) == 0
    assert order == ["start", "check", "ask", "ask", "answer", "answer", "stop", "time"]
    order.clear()
    assert main([*small, "--vocab", "1025"]) == 0
    assert order == ["check", "time", "start", "ask", "answer", "ask", "answer", "stop"]


THE_COMMAND = """
import os, runpy
from benchmarks import memory
from benchmarks.measurement import Measurement

def time(measurement, *args, timed=Measurement.time):
    try:
        print("children:", os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        print("no children")
    return timed(measurement, *args)

Measurement.time, memory._New = time, None
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each provider has a process of its own")
@pytest.mark.parametrize("peers", ["none", pytest.param("compile,trl", marks=pytest.mark.slow)])
def test_the_command_measures_memory_in_copies_of_itself(peers: str, tmp_path: Path) -> None:
    """They import nothing again, are gone before calls are timed, find what new processes find, and can compile."""
    out = tmp_path / "out.json"
    size = ["--device", "cpu", "--tokens", "64", "--vocab", "32000", "--dtype", "fp32", "--rounds", "2"]
    command = [sys.executable, "-c", THE_COMMAND, *size, "--kernels", "cpu/rows", "--peers", peers, "--out", str(out)]
    uncompiled = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    done = subprocess.run(command, cwd=ROOT, env=uncompiled, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no children" in done.stdout
    (run,) = Record.load(out).runs
    gradients = {row.key: (row.peak_extra_bytes or 0) / run.work.logits_bytes for row in run.rows}
    ours = f"{OURS} cpu/rows"
    assert 0.95 < gradients.pop(ours) < 1.2
    assert gradients.pop(f"{ours} in place") < 0.1
    assert all(0.95 < peak < 8 for peak in gradients.values()), gradients
    assert len(gradients) == (0 if peers == "none" else 2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each provider has a process of its own")
def test_a_process_that_dies_says_so() -> None:
    work = Work(tokens=8, vocab=101, dtype="fp32")
    (provider, _) = chosen(work, ["cpu/rows"], ["none"])
    process = memory._Process(work)
    process._running.kill()
    process._running.wait()
    process.ask(provider)
    assert process.answer() == "failed no answer"
    process.stop()


def test_what_cannot_be_prepared_does_not_stop_the_others() -> None:
    prepared: list[torch.device] = []

    def fail(device: torch.device) -> None:
        warnings.warn("about a peer's own affairs", stacklevel=1)
        raise RuntimeError("no compiler")

    steps: list[Callable[[torch.device], object]] = [fail, prepared.append, prepared.append]
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([Provider("made up", str(n), lambda inputs: None, prepare=step) for n, step in enumerate(steps)], cpu)
    assert prepared == [cpu]
    assert gc.isenabled()


def test_memory_of_several_is_measured_one_by_one(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    size = ["--device", "cpu", "--tokens", "64", "--vocab", "200000", "--dtype", "fp32", "--rounds", "2"]
    assert main([*size, "--kernels", "cpu/rows", "--peers", "none", "--out", str(out)]) == 0
    (run,) = Record.load(out).runs
    peaks = {x.overwrites: x.peak_extra_bytes for x in run.rows}
    assert peaks[False] is not None
    assert peaks[False] > 0.9 * run.work.logits_bytes
    assert peaks[True] is not None
    assert peaks[True] < 0.1 * run.work.logits_bytes
