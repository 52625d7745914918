"""Time and memory of calls."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from benchmarks.disturbance import Scheduled, scheduled, share_waited
from benchmarks.measure import Sample, interleaved_rounds, interleaved_times, peak_extra_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_calls_are_interleaved_and_take_turns_in_being_first() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    interleaved_times(calls, CPU, rounds=2, warmup=1)
    assert order in (["b", "a", "a", "b", "b", "a"], ["a", "b", "b", "a", "a", "b"])


def test_a_slow_call_takes_longer_and_its_bounds_hold_the_median() -> None:
    times = interleaved_times({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, CPU, rounds=5)
    assert times["slow"].p20 <= times["slow"].median <= times["slow"].p80
    assert times["slow"].median > 0.019 > times["fast"].median


def test_progress_is_told_of_every_run_and_one_round_is_too_few() -> None:
    steps: list[int] = []
    interleaved_times({"a": lambda: None, "b": lambda: None}, CPU, rounds=3, after_call=lambda: steps.append(1))
    assert len(steps) == 2 * (1 + 3)
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        interleaved_times({"a": lambda: None}, CPU, rounds=1)


def test_on_a_gpu_the_host_is_ahead_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is enqueued: other data read into the cache, a pause, and between two events the call alone."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = f"event {order.count('event')}"
            order.append("event")

        def record(self) -> None:
            order.append(f"record {self.name}")

        def synchronize(self) -> None:
            order.append(f"synchronize {self.name}")

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    class Buffer:
        def sum(self) -> None:
            order.append("read")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("pause"))
    monkeypatch.setattr("benchmarks.measure._l2_sized_buffer", lambda device: Buffer())

    def call() -> None:
        order.append("call")
        time.sleep(0.01)

    found = interleaved_times({"call": call}, torch.device("cuda"), rounds=2, warmup=0)["call"]
    one = ["read", "pause", "event", "event", "record event 0", "call", "record event 1", "synchronize event 1"]
    assert order[: len(one)] == one
    assert found.median == found.p20 == found.p80 == 3e-3
    assert found.host is not None
    assert 0.01 <= found.host < 0.1


def test_on_a_cpu_there_is_no_host_beside_the_device() -> None:
    assert interleaved_times({"call": lambda: None}, CPU, rounds=2)["call"].host is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_launch_gap_does_not_count() -> None:
    x = torch.zeros(16, device="cuda")

    def call() -> None:
        time.sleep(0.0005)
        x.add_(1)

    found = interleaved_times({"call": call}, torch.device("cuda", 0), rounds=5)["call"]
    assert found.median < 2e-4 < 5e-4 <= found.host


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_peak_counts_what_a_call_frees_again_and_counts_it_every_time() -> None:
    def call() -> None:
        torch.ones(48 * MIB, dtype=torch.uint8)
        torch.ones(96 * MIB, dtype=torch.uint8)

    for _ in range(2):
        assert peak_extra_bytes(call, CPU, repeats=3) == pytest.approx(96 * MIB, abs=2 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_memory_that_malloc_kept_from_before_counts_as_new() -> None:
    blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(96)]  # small enough for malloc to keep them
    blocks.clear()
    peak = peak_extra_bytes(lambda: [torch.ones(MIB, dtype=torch.uint8) for _ in range(96)], CPU)
    # A process that has run other tests touches a few pages of its own again after the trim.
    assert peak == pytest.approx(96 * MIB, abs=8 * MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_peak_counts_the_result_and_not_what_was_there_before() -> None:
    before = torch.ones(192 * MIB, dtype=torch.uint8)
    peak = peak_extra_bytes(lambda: before[: 96 * MIB] + 1, CPU, repeats=3)
    assert peak == pytest.approx(96 * MIB, abs=8 * MIB)


def test_memory_that_a_call_keeps_is_measured_again_when_it_is_freed_before() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        if not kept:
            kept.append(torch.ones(32 * MIB, dtype=torch.uint8))

    assert peak_extra_bytes(call, CPU, prepare=kept.clear) >= 30 * MIB
    assert peak_extra_bytes(call, CPU) < 30 * MIB


def test_without_a_peak_that_can_be_reset_the_figure_is_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure._reset_peak", lambda: False)
    assert 0 <= peak_extra_bytes(lambda: torch.ones(16 * MIB, dtype=torch.uint8), CPU) <= 24 * MIB


def test_disturbed_rounds_are_repeated_and_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two calls the second one waits half of its time, and takes long, in rounds 1, 2 and 4."""
    rounds = iter([(0.0, 0.001), (0.5, 0.05), (0.5, 0.05), (0.0, 0.001), (0.5, 0.05), (0.0, 0.001), (0.0, 0.001)])

    def measured(call: Callable[[], object], device: torch.device) -> Sample:
        waited, seconds = next(rounds) if call() else (0.0, 0.001)
        return Sample(seconds, waited=waited)

    monkeypatch.setattr("benchmarks.measure._wall_seconds", measured)
    calls = {"a": lambda: False, "b": lambda: True}
    found = interleaved_rounds(calls, CPU, rounds=3, most=6, warmup=1)
    assert found.times["b"].p80 == 0.001
    assert (found.repeated, found.disturbed) == (3, 0)
    assert next(rounds, None) is None


def test_the_least_disturbed_count_where_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([Sample(1.0, waited=0.4), Sample(2.0, waited=0.1), Sample(3.0, waited=0.3), Sample(4.0, waited=0.2)])
    monkeypatch.setattr("benchmarks.measure._wall_seconds", lambda call, device: next(samples))
    found = interleaved_rounds({"a": lambda: None}, CPU, rounds=2, most=4, warmup=0)
    assert (found.times["a"].median, found.repeated, found.disturbed) == (3.0, 2, 2)


@pytest.mark.skipif(scheduled() is None, reason="the system does not tell how long a thread waits for a processor")
def test_a_process_on_the_same_core_disturbs() -> None:
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    spin = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"

    def call() -> None:
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass

    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            os.sched_setaffinity(0, [core])
            found = interleaved_rounds({"call": call}, CPU, rounds=3, most=5)
        finally:
            os.sched_setaffinity(0, allowed)
            other.kill()
    assert found.repeated == 2
    assert found.disturbed


def test_a_thread_beside_the_call_does_not_count() -> None:
    """Of 10 ms the main thread ran 9 and waited 1, another one waited 2 and ran none, a third one waited 0.2."""
    idle = dict.fromkeys("abc", Scheduled(1.0, 1.0))
    after = {"a": Scheduled(1.009, 1.001), "b": Scheduled(1.0, 1.002), "c": Scheduled(1.0098, 1.0002)}
    assert share_waited(idle, after, 0.01) == pytest.approx(0.1)
    assert share_waited(idle, {"c": after["c"]}, 0.01) == 0
