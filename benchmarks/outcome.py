"""The record of finished runs, and what is wrong in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from benchmarks import hardware
from benchmarks.providers import OURS
from benchmarks.record import FAILED, OK, WRONG, Record, Run


def wrong_kernels(runs: Sequence[Run], names: Collection[str] = (OURS,)) -> str:
    """The kernels of providers with these names that are wrong or failed, with the reason; empty if there are none."""
    rows = [row for run in runs for row in run.rows if row.name in names and row.status != OK]
    said = {WRONG: "is wrong", FAILED: "failed"}
    return "; ".join(f"{row.kernel} {said[row.status]}: {row.reasons[0]}" for row in rows)


def record_of(runs: Sequence[Run], device: torch.device) -> Record:
    """The record of the runs of this process."""
    return Record(hardware.now(), *hardware.commit(), hardware.versions(), hardware.hardware(device), runs)
