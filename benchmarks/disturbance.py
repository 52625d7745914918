"""Whether other processes held a call up: how long its threads waited for a processor."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TASKS = Path("/proc/self/task")

TOLERATED = 0.05
"""Share of a call's time that a thread may wait."""
LEAST_SECONDS = 3e-4
"""A thread that wakes up waits for some microseconds on an idle machine too; a process that is in its way runs for a
millisecond and longer."""


class Scheduled(NamedTuple):
    """Seconds of a thread: with a processor, and ready to run without one."""

    ran: float
    waited: float


def scheduled() -> dict[str, Scheduled] | None:
    """What the system says of each thread of this process; None where it does not tell (outside Linux)."""
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
    """Share of a call's time that the thread which waited longest spent without a processor; 0 where it is tolerated.

    Threads that had little to do with the call, as one that draws a progress bar, do not count: those that neither ran
    nor waited for half of it.

    Args:
        before, after: ``scheduled()`` at the call's beginning and end.
        seconds: that it took.
    """
    longest = 0.0
    for thread, end in after.items():
        start = before.get(thread, Scheduled(0.0, 0.0))
        ran, waited = end.ran - start.ran, end.waited - start.waited
        if ran + waited >= seconds / 2:
            longest = max(longest, waited)
    return longest / seconds if longest > max(LEAST_SECONDS, TOLERATED * seconds) else 0.0
