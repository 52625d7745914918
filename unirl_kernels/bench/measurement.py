"""Measures providers side by side: first whether each is right, then its time, then its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from unirl_kernels.bench.buffers import Ring
from unirl_kernels.bench.cases import Case, copy_call, sum_call
from unirl_kernels.bench.memory import peak_in_fresh_process
from unirl_kernels.bench.providers import Provider, Skipped
from unirl_kernels.bench.record import FAILED, OK, WRONG, Row, Run
from unirl_kernels.bench.truth import Truth
from unirl_kernels.bench.work import Inputs, Work
from unirl_kernels.measure import Timing, interleaved_times

COPY, SUM = "copy_", "sum"
Step = Callable[[], object]


class Measurement:
    """Providers on one piece of work.

    Args:
        work: the work.
        providers: who takes part.
    """

    def __init__(self, work: Work, providers: Sequence[Provider]) -> None:
        self.work, self.providers = work, providers
        self.inputs = Inputs.make(work)
        self.ring = Ring(self.inputs.logits)
        self.rows: dict[str, Row] = {}
        self.skipped: dict[str, str] = {}
        self._cases: dict[str, Case] = {}

    def check(self, after_each: Step) -> None:
        """Let each provider do the work once, and hold it against fp64."""
        truth = Truth(self.inputs)
        for provider in self.providers:
            try:
                self.rows[provider.key] = self._checked(provider, truth)
            except Skipped as reason:
                self.skipped[f"{provider.name} {provider.kernel}"] = str(reason)
            except Exception as error:  # a peer may raise anything, and the others still count
                message = str(error).strip().splitlines() or [""]
                reasons = [f"{type(error).__name__}: {message[0]}"]
                self.rows[provider.key] = Row(provider.name, provider.kernel, provider.overwrites, FAILED, reasons)
            after_each()

    def _checked(self, provider: Provider, truth: Truth) -> Row:
        case = Case(provider.bind(self.inputs), self.inputs, self.ring, provider.overwrites)
        found = truth.check(*case())
        case.renew()
        if not found.problems:
            self._cases[provider.key] = case
        return Row(
            provider.name,
            provider.kernel,
            provider.overwrites,
            WRONG if found.problems else OK,
            found.problems,
            None,
            None,
            *(_number(x) for x in (found.logp_error, found.entropy_error, found.gradient_error)),
        )

    def time(self, rounds: int, after_each: Step) -> tuple[Timing, Timing]:
        """Time those that are right; the times of ``copy_`` and of the sum."""
        called: list[Case] = []

        def noted(case: Case) -> Callable[[], object]:
            def call() -> object:
                called.append(case)
                return case()

            return call

        def after_call() -> None:
            while called:
                called.pop().renew()
            after_each()

        calls = {COPY: copy_call(self.ring), SUM: sum_call(self.ring)}
        calls |= {key: noted(case) for key, case in self._cases.items()}
        device = torch.device(self.work.device)
        times = interleaved_times(calls, device, rounds=rounds, after_call=after_call)
        for key in self._cases:
            self.rows[key] = replace(self.rows[key], time=times[key])
        return times[COPY], times[SUM]

    def calls(self, rounds: int) -> int:
        """How often ``time`` calls ``after_each``."""
        return (2 + len(self._cases)) * (1 + rounds)

    def memory(self, after_each: Step) -> None:
        """Measure the memory of those that are right. Frees what this process holds for the work."""
        right = list(self._cases)
        self._cases.clear()
        del self.ring, self.inputs
        for provider in self.providers:
            if provider.key in right:
                peak = peak_in_fresh_process(provider, self.work)
                self.rows[provider.key] = replace(self.rows[provider.key], peak_extra_bytes=peak)
                after_each()

    @property
    def right(self) -> int:
        """How many providers passed ``check``."""
        return len(self._cases)

    def run(self, rounds: int, copy: Timing, total: Timing) -> Run:
        return Run(self.work, self.work.floor_bytes, rounds, copy, total, list(self.rows.values()), self.skipped)


def _number(x: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if x is None or math.isfinite(x) else None
