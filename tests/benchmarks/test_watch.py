"""A kernel that fails late, does not return or loses the device: the other kernels are still measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import selection, suite
from benchmarks.inputs import Inputs, Values
from benchmarks.providers import Function, Provider
from benchmarks.record import FAILED, OK, Record, Run
from benchmarks.work import Work
from tests import ROOT

Raises = Callable[[int], None]
"""Called with the number of the call, from 1 on, before the kernel does its work."""


def taking_part(monkeypatch: pytest.MonkeyPatch, before: Raises) -> None:
    """Let a copy of a kernel of ours take part before the others."""

    def chosen(work: Work, kernels: Sequence[str], peers: Sequence[str]) -> list[Provider]:
        ours = selection.chosen(work, ["cpu/rows"], ["none"], overwrite=False)

        def bind(inputs: Inputs) -> Function:
            function, calls = ours[0].bind(inputs), 0

            def call(*operands: object) -> Values:
                nonlocal calls
                calls += 1
                before(calls)
                return function(*operands)

            return call

        return [Provider("made up", "copy", bind), *ours]

    monkeypatch.setattr(suite, "chosen", chosen)


def run_suite(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["suite", str(folder), "logits", "--modes", "fused", "--small"])
    return suite.main()


def runs_in(folder: Path) -> list[Run]:
    return [run for file in sorted(folder.glob("*.json")) for run in Record.load(file).runs]


def test_a_kernel_that_fails_while_it_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def before(call: int) -> None:
        if call > 1:
            raise RuntimeError("made up")

    taking_part(monkeypatch, before)
    folder = tmp_path / "made" / "by" / "the suite"
    run_suite(monkeypatch, folder)
    runs = runs_in(folder)
    assert len(runs) == 2
    for run in runs:
        assert [(row.name, row.status) for row in run.rows] == [("unirl_kernels", OK), ("made up", FAILED)]
        assert run.rows[0].time is not None
        assert list(run.rows[1].reasons) == ["RuntimeError: made up"]


def test_a_kernel_that_loses_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    is_lost = False

    def before(call: int) -> None:
        nonlocal is_lost
        is_lost = call == 3
        if is_lost:
            raise RuntimeError("an illegal memory access was encountered")

    taking_part(monkeypatch, before)
    monkeypatch.setattr(suite, "lost", lambda device: is_lost)
    assert run_suite(monkeypatch, tmp_path) == 3
    assert not runs_in(tmp_path)
    is_lost = False
    assert run_suite(monkeypatch, tmp_path) == 0
    assert [[row.name for row in run.rows] for run in runs_in(tmp_path)] == [["unirl_kernels"]] * 2
    assert [dict(run.skipped) for run in runs_in(tmp_path)] == [{"made up copy": "loses the device"}] * 2


HANGS = """
import sys, time
from benchmarks import selection, suite, watch
from benchmarks.providers import Provider
watch.LIMITS["cpu"] = 2.0
def chosen(work, kernels, peers):
    ours = selection.chosen(work, ["cpu/rows"], ["none"], overwrite=False)
    return [*ours, Provider("made up", "hangs", lambda inputs: lambda *operands: time.sleep(600))]
suite.chosen = chosen
sys.argv = ["suite", sys.argv[1], "logits", "--modes", "fused", "--small"]
sys.exit(suite.main())
"""


def test_a_kernel_that_does_not_return(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert first.returncode == 3, first.stderr
    assert "WRONG made up hangs: does not return within 2 s" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert second.returncode == 0, second.stderr
    assert [[row.status for row in run.rows] for run in runs_in(tmp_path)] == [[OK]] * 2
