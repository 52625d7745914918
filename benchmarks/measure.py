"""Time and peak memory of calls, measured so that they can be compared."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds that one call took: the median over the rounds, and the bounds of the middle 60 %.

    ``host``: on a CUDA device, the median of the seconds until the call returned while the device was still busy with
    something else. A call that waits for the device shows that wait, too.
    """

    median: float
    p20: float
    p80: float
    host: float | None = None


class Sample(NamedTuple):
    """Seconds of one call, and on a CUDA device those until it returned."""

    seconds: float
    host: float | None = None


def interleaved_times(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 7,
    warmup: int = 1,
    after_call: Call = lambda: None,
) -> dict[str, Timing]:
    """Time several calls side by side: each round runs every call once, starting with another one each time.

    A machine that slows down for a second slows all of them down. What a call returns is freed outside its time.

    Args:
        calls: what to time, by name.
        device: where the calls compute; on a CUDA device its own clock is read, and its L2 cache holds other data.
        rounds: timed runs of each call, at least 2.
        warmup: runs of each call before the first timed one.
        after_call: called after every run, untimed; to show progress.

    Returns:
        For each name the ``Timing``.

    Raises:
        ValueError: when there are fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    clock = _cuda_seconds if device.type == "cuda" else _wall_seconds
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    names = list(calls)
    for n in range(-warmup, rounds):
        start = n % len(names)
        for name in names[start:] + names[:start]:
            elapsed = clock(calls[name], device)
            if n >= 0:
                samples[name].append(elapsed)
            after_call()
    return {name: _timing(of_call) for name, of_call in samples.items()}


def _timing(samples: list[Sample]) -> Timing:
    seconds = [sample.seconds for sample in samples]
    hosts = [sample.host for sample in samples if sample.host is not None]
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), p20, p80, statistics.median(hosts) if hosts else None)


def _wall_seconds(call: Call, device: torch.device) -> Sample:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return Sample(elapsed)


HEAD_START_CYCLES = 4_000_000
"""About 2 ms: a call of the smallest kernel takes Python 0.1 to 0.2 ms, one under autograd a multiple of that."""


def _cuda_seconds(call: Call, device: torch.device) -> Sample:
    with torch.cuda.device(device):
        # Read, not written: lines that a write leaves dirty are written back in the time of the call.
        _l2_sized_buffer(device).sum()
        # Without a head start the gap between the start and the first launch would count as the kernel's time.
        torch.cuda._sleep(HEAD_START_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        result = call()
        host = time.perf_counter() - before
        end.record()
        end.synchronize()
    del result
    return Sample(start.elapsed_time(end) / 1e3, host)


@cache
def _l2_sized_buffer(device: torch.device) -> torch.Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.zeros(2 * size // 4, dtype=torch.float32, device=device)


def peak_extra_bytes(call: Call, device: torch.device, *, prepare: Call = lambda: None, repeats: int = 1) -> int:
    """Memory that a call needs at its peak, on top of what was in use before it; its result counts.

    On CUDA the allocator's account. On the CPU the process's resident memory: a page counts when it is first written,
    whoever allocated it, until it is given back to the system, which malloc does at once with blocks above 32 MiB.
    Code that is read for the first time counts as well, a few MB in the first run, so the least of the runs is taken.
    Where the peak cannot be reset (outside Linux) the figure is a lower bound: what the call needs beyond the
    process's highest peak so far.

    Args:
        call: what to measure.
        device: where it computes.
        prepare: called before each run; to free what an earlier run has kept. On a CPU memory that a backend keeps for
            reuse is not seen otherwise: pass its ``release_memory``.
        repeats: runs.

    Returns:
        Bytes, at least 0.
    """
    gc.collect()
    return min(_peak(call, device, prepare) for _ in range(repeats))


def _peak(call: Call, device: torch.device, prepare: Call) -> int:
    prepare()
    if device.type == "cuda":
        return _cuda_peak(call, device)
    _return_freed_memory()
    if not _reset_peak():
        before = _max_resident_bytes()
        call()
        return _max_resident_bytes() - before
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _cuda_peak(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _return_freed_memory() -> None:
    """Give what was freed back to the system: pages that malloc keeps would hide that the call needs them again."""
    if trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):
        trim(0)


def _reset_peak() -> bool:
    """Set the process's peak of resident memory to its present size; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}")


def _max_resident_bytes() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
