"""Detects whether other processes delayed a call: how long its threads waited for a processor."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TASKS = Path("/proc/self/task")

TOLERATED = 0.05
"""The share of a call's time that a thread may wait."""
LEAST_SECONDS = 3e-4
"""Shorter waits are ignored: on an idle machine a thread waits some microseconds when it wakes up. A disturbing process
runs for a millisecond or longer."""


class Scheduled(NamedTuple):
    """Seconds that a thread ran, and that it waited for a processor."""

    ran: float
    waited: float


def scheduled() -> dict[str, Scheduled] | None:
    """Run and wait times of each thread of this process; None if the system does not have them (outside Linux)."""
    found = {}
    try:
        for task in TASKS.iterdir():
            try:
                ran, waited, _ = map(int, (task / "schedstat").read_bytes().split())
            except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
                continue
            found[task.name] = Scheduled(ran / 1e9, waited / 1e9)
    except (OSError, ValueError):
        return None
    return found or None


def share_waited(before: dict[str, Scheduled], after: dict[str, Scheduled], seconds: float) -> float:
    """The share of a call's time for which its longest waiting thread waited; 0 if it is tolerated.

    A thread that ran and waited for less than half of the call is ignored, such as one that draws a progress bar.

    Args:
        before, after: ``scheduled()`` at the beginning and end of the call.
        seconds: duration of the call.
    """
    longest = 0.0
    for thread, end in after.items():
        start = before.get(thread, Scheduled(0.0, 0.0))
        ran, waited = end.ran - start.ran, end.waited - start.waited
        if ran + waited >= seconds / 2:
            longest = max(longest, waited)
    return longest / seconds if longest > max(LEAST_SECONDS, TOLERATED * seconds) else 0.0
