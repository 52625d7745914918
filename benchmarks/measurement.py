"""Measures providers side by side: first whether each is right, then its time, then its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.buffers import Ring
from benchmarks.cases import Case
from benchmarks.hardware import Elsewhere
from benchmarks.levels import level_of
from benchmarks.measure import Interrupted, Rounds, interleaved_rounds
from benchmarks.memory import Peaks
from benchmarks.providers import Function, Provider, Skipped
from benchmarks.record import FAILED, OK, WRONG, Row, Run
from benchmarks.truth import Check, Truth
from benchmarks.work import Work

Step = Callable[[], object]

MOST_ROUNDS = 2
"""So many times the rounds that were asked for are run where other processes disturb them."""


class Measurement:
    """Providers on one piece of work.

    Args:
        work: the work.
        providers: who takes part.
    """

    def __init__(self, work: Work, providers: Sequence[Provider]) -> None:
        self.work, self.providers = work, providers
        self.level = level_of(work)
        self.inputs = self.level.make(work)
        self.rings = [Ring(x) for x in self.inputs.operands]
        self.baselines = self.level.baselines(work, self.rings)
        self.rows: dict[str, Row] = {}
        self.skipped: dict[str, str] = {}
        self.cases: dict[str, Case] = {}
        """The providers that passed ``check``."""

    def check(self, after_each: Step, before: Callable[[Provider], object] = lambda provider: None) -> None:
        """Let each provider do the work once, and hold it against fp64; ``before`` is called with those that can do it.

        Those that compile come first, so that they can do so for ``before`` on another processor at the same time.
        """
        truth = self.level.truth(self.inputs)
        for provider in sorted(self.providers, key=lambda provider: provider.prepare is None):
            try:
                function = provider.bind(self.inputs)
                before(provider)
                self.rows[provider.key] = self._checked(provider, function, truth)
            except Skipped as reason:
                self.skipped[f"{provider.name} {provider.kernel}"] = str(reason)
            except Exception as error:  # a peer may raise anything, and the others still count
                message = str(error).strip().splitlines() or [""]
                reasons = [f"{type(error).__name__}: {message[0]}"]
                self.rows[provider.key] = Row(provider.name, provider.kernel, provider.overwrites, FAILED, reasons)
            after_each()

    def _checked(self, provider: Provider, function: Function, truth: Truth) -> Row:
        case = Case(function, self.inputs, self.rings, provider.overwrites)
        try:
            found = truth.check(*case())
        finally:
            intact = case.operands_are_intact()
            case.renew()
        if not (intact or provider.overwrites):
            found.problems.append("operands: overwritten where a fresh gradient was asked for")
        if not found.problems:
            self.cases[provider.key] = case
        status = WRONG if found.problems else OK
        row = Row(provider.name, provider.kernel, provider.overwrites, status, found.problems)
        return replace(row, **_errors(found))

    def time(self, rounds: int, after_each: Step, keep: Callable[[Run], None] = lambda run: None) -> Run:
        """Time the providers that are right. If interrupted, ``keep`` gets the results of complete rounds."""
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

        calls = {**self.baselines, **{key: noted(case) for key, case in self.cases.items()}}
        elsewhere = Elsewhere()
        device = torch.device(self.work.device)
        most = MOST_ROUNDS * rounds
        try:
            found = interleaved_rounds(calls, device, rounds=rounds, most=most, after_call=after_call)
        except Interrupted as stop:
            keep(self._run(stop.rounds, elsewhere))
            raise
        return self._run(found, elsewhere)

    def _run(self, found: Rounds, elsewhere: Elsewhere) -> Run:
        for key in self.cases:
            self.rows[key] = replace(self.rows[key], time=found.times[key])
        share, rows = elsewhere.share(), list(self.rows.values())
        more: dict[str, Any] = {**self.level.floor(self.work), **{name: found.times[name] for name in self.baselines}}
        more |= {"repeated": found.repeated, "disturbed": found.disturbed}
        return Run(self.work, found.counted, share, rows, self.skipped, **more)

    def calls(self, rounds: int) -> int:
        """How often ``time`` calls ``after_each`` where no round has to be repeated."""
        return (len(self.baselines) + len(self.cases)) * (1 + rounds)

    def memory(self, run: Run, peaks: Peaks, after_each: Step) -> Run:
        """Add the memory of the providers that are right to their rows. Frees the work's memory in this process."""
        self.cases.clear()
        del self.rings, self.inputs, self.baselines
        if torch.device(self.work.device).type == "cuda":
            torch.cuda.empty_cache()
        providers = {provider.key: provider for provider in self.providers}
        right = [providers[row.key] for row in run.rows if row.status == OK]
        found = peaks.of(right)
        rows = []
        for row in run.rows:
            if row.status == OK:
                row = replace(row, peak_extra_bytes=next(found))
                after_each()
            rows.append(row)
        return replace(run, rows=rows)


def _errors(found: Check) -> dict[str, Any]:
    """As ``Row`` has them: absolute of what is in nats, else relative."""
    errors = found.relative | {name: found.largest[name] for name in ("logp", "entropy") if name in found.largest}
    # JSON has no NaN and no infinity.
    return {f"{name}_error": x if math.isfinite(x) else None for name, x in errors.items()}
