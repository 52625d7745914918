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

from benchmarks.disturbance import scheduled, share_waited

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
    """Seconds of one call; on a CUDA device those until it returned; on a CPU the share of them that a thread waited
    for a processor, see ``disturbance``."""

    seconds: float
    host: float | None = None
    waited: float | None = None


class Rounds(NamedTuple):
    """What interleaved rounds found.

    Args:
        times: of each call.
        counted: rounds that they are made of.
        repeated: rounds that were run once more, because other processes had held a call up.
        disturbed: rounds that count although one was held up. Both None where the system does not tell.
    """

    times: dict[str, Timing]
    counted: int
    repeated: int | None
    disturbed: int | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during the rounds; ``rounds`` has the results of the complete ones."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds


def interleaved_times(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 7,
    warmup: int = 1,
    after_call: Call = lambda: None,
) -> dict[str, Timing]:
    """``interleaved_rounds`` without repetitions: for each name the ``Timing``."""
    return interleaved_rounds(calls, device, rounds=rounds, warmup=warmup, after_call=after_call).times


def interleaved_rounds(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 7,
    most: int = 0,
    warmup: int = 1,
    after_call: Call = lambda: None,
) -> Rounds:
    """Time several calls side by side: each round runs every call once, starting with another one each time.

    A machine that slows down for a second slows all of them down. What a call returns is freed outside its time. A
    round in which other processes held a call up is repeated; of all rounds those count that were disturbed least,
    whatever their times.

    Args:
        calls: what to time, by name.
        device: where the calls compute; on a CUDA device its own clock is read, and its L2 cache holds other data.
        rounds: timed runs of each call that count, at least 2.
        most: rounds in all, the repeated ones included; up to ``rounds`` nothing is repeated.
        warmup: runs of each call before the first timed one.
        after_call: called after every run, untimed; to show progress.

    Raises:
        ValueError: when there are fewer than 2 rounds.
        Interrupted: by Ctrl-C, once two rounds are complete.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    clock = _cuda_seconds if device.type == "cuda" else _wall_seconds
    found: list[dict[str, Sample]] = []
    names, undisturbed = list(calls), 0
    try:
        for n in range(-warmup, max(rounds, most)):
            if undisturbed == rounds:
                break
            start = n % len(names)
            samples = {}
            for name in names[start:] + names[:start]:
                samples[name] = clock(calls[name], device)
                after_call()
            if n >= 0:
                found.append(samples)
                undisturbed += not _disturbance(samples)
    except KeyboardInterrupt as stop:
        if len(found) < 2:
            raise
        raise Interrupted(_rounds(found, rounds)) from stop
    return _rounds(found, rounds)


def _rounds(found: list[dict[str, Sample]], rounds: int) -> Rounds:
    counted = sorted(found, key=_disturbance)[:rounds]
    times = {name: _timing([samples[name] for samples in counted]) for name in found[0]}
    if any(sample.waited is None for samples in found for sample in samples.values()):
        return Rounds(times, len(counted), None, None)
    disturbed = sum(_disturbance(samples) > 0 for samples in counted)
    return Rounds(times, len(counted), len(found) - len(counted), disturbed)


def _disturbance(samples: Mapping[str, Sample]) -> float:
    """The disturbance of a round: that of the call that was held up most."""
    return max((sample.waited or 0.0 for sample in samples.values()), default=0.0)


def _timing(samples: list[Sample]) -> Timing:
    seconds = [sample.seconds for sample in samples]
    hosts = [sample.host for sample in samples if sample.host is not None]
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), p20, p80, statistics.median(hosts) if hosts else None)


def _wall_seconds(call: Call, device: torch.device) -> Sample:
    before = scheduled()
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    after = scheduled()
    del result
    return Sample(elapsed, waited=None if before is None or after is None else share_waited(before, after, elapsed))


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
