"""``python -m benchmarks.suite``: its works, and what it says of peers."""

from __future__ import annotations

import pytest

from benchmarks import suite
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
