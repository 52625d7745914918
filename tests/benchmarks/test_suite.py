"""``python -m benchmarks.suite``: its works, and what it says of peers."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import profiled, suite
from benchmarks.measure import Timing
from benchmarks.providers import OURS
from benchmarks.record import OK, Row, Run
from benchmarks.work import Work


def run_of(seconds: dict[str, float]) -> Run:
    rows = [Row(name, "kernel", False, OK, time=Timing(x, x, x)) for name, x in seconds.items()]
    return Run(Work(), rounds=1, elsewhere=None, rows=rows, skipped={})


def test_a_peer_that_is_faster_is_named() -> None:
    assert suite.faster_peers(run_of({OURS: 2.0, "slow": 3.0, "fast": 1.0})) == ["FASTER fast kernel: 0.50 x"]
    assert suite.faster_peers(run_of({"fast": 1.0})) == []


@pytest.mark.parametrize("device", suite.SIZES)
def test_a_work_has_a_file_of_its_own(device: str) -> None:
    for part in suite.PARTS:
        names = [suite.name_of(part, work) for work in suite.works(part, device, few=False)]
        assert names
        assert len(names) == len(set(names))


def test_a_work_that_no_kernel_of_this_package_did_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is not saved, so that a later step measures it."""
    run = replace(run_of({"eager": 2.0}), skipped={OURS: "cannot run here"})
    monkeypatch.setattr(suite, "timed_without_failing", lambda *_: run)
    monkeypatch.setattr(suite, "markdown", str)
    monkeypatch.setattr(suite, "remarks", lambda _: [])
    options = argparse.Namespace(folder=tmp_path, kernels=["cpu"], small=True)
    watch = SimpleNamespace(left_out=dict)
    said = suite.measure("logits", Work(device="cpu"), options, watch)  # type: ignore[arg-type]
    assert said.startswith("no kernel of this package ran: ")
    assert "cannot run here" in said
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_cannot_be_profiled_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["profiled", "cuda/cluster", "cpu/rows", "--small"])
    assert profiled.main() == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("WRONG cuda/cluster: ")
    assert second == "cpu/rows"
