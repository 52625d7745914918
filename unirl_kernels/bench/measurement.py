"""Measures providers side by side: first whether each is right, then its time, then its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from unirl_kernels.bench.buffers import Ring
from unirl_kernels.bench.cases import Case, copy_call, sum_call
from unirl_kernels.bench.hardware import Elsewhere
from unirl_kernels.bench.memory import peak_in_fresh_process
from unirl_kernels.bench.providers import Provider, Skipped
from unirl_kernels.bench.record import FAILED, OK, WRONG, Row, Run
from unirl_kernels.bench.truth import Truth
from unirl_kernels.bench.work import Inputs, Work
from unirl_kernels.measure import interleaved_times

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
        self.cases: dict[str, Case] = {}
        """Those that passed ``check``."""

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
        try:
            found = truth.check(*case())
        finally:
            intact = case.logits_are_intact()
            case.renew()
        if not (intact or provider.overwrites):
            found.problems.append("logits: overwritten where a fresh gradient was asked for")
        if not found.problems:
            self.cases[provider.key] = case
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

    def time(self, rounds: int, after_each: Step) -> Run:
        """Time those that are right."""
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
        calls |= {key: noted(case) for key, case in self.cases.items()}
        elsewhere = Elsewhere()
        times = interleaved_times(calls, torch.device(self.work.device), rounds=rounds, after_call=after_call)
        for key in self.cases:
            self.rows[key] = replace(self.rows[key], time=times[key])
        share, floor, rows = elsewhere.share(), self.work.floor_bytes, list(self.rows.values())
        return Run(self.work, floor, rounds, share, times[COPY], times[SUM], rows, self.skipped)

    def calls(self, rounds: int) -> int:
        """How often ``time`` calls ``after_each``."""
        return (2 + len(self.cases)) * (1 + rounds)

    def memory(self, run: Run, after_each: Step) -> Run:
        """Measure the memory of those that are right, and add it to their rows. Frees what the work holds here."""
        self.cases.clear()
        del self.ring, self.inputs
        if torch.device(self.work.device).type == "cuda":
            torch.cuda.empty_cache()
        providers = {provider.key: provider for provider in self.providers}
        rows = []
        for row in run.rows:
            if row.status == OK:
                row = replace(row, peak_extra_bytes=peak_in_fresh_process(providers[row.key], self.work))
                after_each()
            rows.append(row)
        return replace(run, rows=rows)


def _number(x: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return x if x is None or math.isfinite(x) else None
