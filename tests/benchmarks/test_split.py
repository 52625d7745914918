"""``--tp``: what it times, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import __main__ as benchmarks
from benchmarks.split import ONE_PASS, SPLIT, TWO_PASSES, Setting, _calls


@pytest.mark.parametrize("hidden", [None, 12])
def test_calls_are_of_the_same_work(hidden: int | None) -> None:
    """In a group of one, whose columns are all columns, every call gives the same gradients."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        calls = _calls(Setting(1, 9, 101, hidden, "fp32", 2, 0), 0)
        split, one_pass, two_passes = (calls[name]() for name in (SPLIT, ONE_PASS, TWO_PASSES))
        torch.testing.assert_close(split, one_pass)
        torch.testing.assert_close(split, two_passes)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "tp.json"
    size = ["--tokens", "8", "--vocab", "101", "--dtype", "fp32", "--rounds", "2"]
    assert benchmarks.main(["--tp", "2", *size, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["split"] == Setting(2, 8, 101, None, "fp32", 2, 0)._asdict()
    assert list(record["times"]) == [SPLIT, ONE_PASS, TWO_PASSES]
    assert all(0 < time["p20"] <= time["median"] <= time["p80"] for time in record["times"].values())
    assert {"date", "commit", "versions", "hardware"} <= record.keys()
    said = capfd.readouterr().out
    assert "grpo, 8 x 101 fp32 over 2 processes" in said.replace("×", "x")
    assert SPLIT in said
