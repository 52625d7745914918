"""Every kernel and peer on small work, for pytest-benchmark: ``make bench-providers``.

``python -m benchmarks`` compares them side by side, on work of a realistic size; these are for watching one
of them from one commit to the next (``--benchmark-save``, ``--benchmark-compare``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.levels import level_of
from benchmarks.measure import Timing, interleaved_times
from benchmarks.measurement import Measurement
from benchmarks.providers import OURS, Provider
from benchmarks.record import FAILED, OK, Run, size
from benchmarks.selection import chosen
from benchmarks.work import FORWARD_BACKWARD, FUSED, STATS, Work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKS = [
    Work(mode=mode, tokens=64, vocab=32000, dtype=dtype, device=DEVICE, hidden=hidden)
    for hidden in (None, 256)
    for mode in (FUSED, STATS, FORWARD_BACKWARD)
    for dtype in ("fp32", "bf16")
]
ROUNDS = 5


def _name(work: Work) -> str:
    return f"{work.mode} {size(work).replace('×', 'x')}"


PAIRS = [
    pytest.param(work, provider, id=f"{_name(work)}-{provider.key}".replace(" ", "-"))
    for work in WORKS
    for provider in chosen(work, ["all"], ["all"])
]


@lru_cache(maxsize=1)
def baselines(work: Work) -> dict[str, Timing]:
    """What the machine does at best, by name."""
    calls = Measurement(work, []).baselines
    return interleaved_times(calls, torch.device(work.device), rounds=ROUNDS)


@pytest.mark.parametrize(("work", "provider"), PAIRS)
def test_provider(work: Work, provider: Provider, benchmark: Any) -> None:
    """The time of one that is right; a wrong one of ours fails, a wrong peer is skipped."""
    measurement = Measurement(work, [provider])
    measurement.check(lambda: None)
    for reason in measurement.skipped.values():
        pytest.skip(reason)
    row = measurement.rows[provider.key]
    if row.status != OK:
        (pytest.fail if provider.name == OURS or row.status == FAILED else pytest.skip)(f"{row.status}: {row.reasons}")
    best = baselines(work)
    case = measurement.cases[provider.key]

    def call() -> None:
        case()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = _name(work)
    benchmark.pedantic(call, setup=case.renew, rounds=ROUNDS, warmup_rounds=1)
    floor: dict[str, Any] = {**level_of(work).floor(work), **best}
    run = Run(work, ROUNDS, None, [], {}, **floor)
    benchmark.extra_info["floor_seconds"] = run.floor_seconds
    benchmark.extra_info["fraction_of_floor"] = run.floor_seconds / benchmark.stats.stats.median
