"""The machine and the versions of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.buffers import last_level_cache_bytes
from unirl_kernels import __version__, backends
from unirl_kernels.commands.machine import processor

SOURCE = Path(__file__).parent
PEERS = ("trl", "liger-kernel", "flash-linear-attention", "flash-attn", "quack-kernels", "cut-cross-entropy")
COMPUTING = (":/unirl_kernels", ":/csrc", ":/setup.py", ":(top,glob)benchmarks/**/*.py")
"""The parts of the checkout that affect a measurement."""


def versions() -> dict[str, str]:
    """Versions of Python, the package and the measured libraries, if installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "unirl_kernels": __version__}
    for library in ("triton", *PEERS):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, str | int]:
    """The processor, and the GPU if ``device`` is one."""
    found: dict[str, str | int] = {
        "cpu": processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache_bytes(device),
    }
    if backends.unavailable("cpu", torch.device("cpu")) is None:
        from unirl_kernels.backends import cpu

        found["instruction_set"] = cpu.report()["instruction set"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


COUNTABLE_SECONDS = 0.5
"""The system counts processor time in hundredths of a second."""


class Elsewhere:
    """The load by other processes since this object was created."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all busy processors, and of processors used by this process."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:2])

    def share(self) -> float | None:
        """The share of all processors' time, 0 to 1; None if the system does not have it, or the time is too short to
        count."""
        end = self._now()
        if self._start is None or end is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(self._start, end, strict=True))
        if elapsed < COUNTABLE_SECONDS:
            return None
        return min(1.0, max(0.0, (busy - own) / (elapsed * (os.cpu_count() or 1))))


def commit() -> tuple[str, bool]:
    """The commit of the checkout, and whether its code was changed; ``unknown`` outside of a checkout."""
    try:
        name, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *COMPUTING)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
    return name.strip(), bool(changes.strip())


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(SOURCE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
