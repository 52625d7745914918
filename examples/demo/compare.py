"""Fused against naive on the same input: value and gradients against the fp64 oracle, time, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.measure import Timing, interleaved_times, peak_extra_bytes
from examples.demo.computations import Computations, Gradients
from examples.demo.sources import Degenerate, Source
from unirl_kernels import backends
from unirl_kernels.testing.budgets import Error, budget, condition_of, error

FUSED, NAIVE = "fused", "naive"
ULPS = 4
"""Units in the last place that an error may have in addition to twice that of naive fp32."""

NO_DIGIT = 0.1
"""From this relative error on, no decimal digit is right."""


@dataclass(frozen=True)
class Check:
    """The error against the fp64 oracle, and the largest allowed one."""

    error: float
    tolerance: float

    @property
    def failed(self) -> bool:
        return not self.error <= self.tolerance  # so that NaN fails


@dataclass(frozen=True)
class Row:
    """A row of one of the demo's tables.

    Args:
        algorithm, equation: from the paradigm's table.
        data: where the samples come from.
        tokens: valid ones, those that the loss counts.
        loss: the fused one.
        checks: of the loss, absolute error, under ``loss``; of each gradient, relative L2, under its name.
        time: of loss and gradients, by ``FUSED`` and ``NAIVE``.
        peak_bytes: extra memory of the same, the gradients included.
    """

    algorithm: str
    equation: str
    data: str
    tokens: int
    loss: float
    checks: dict[str, Check]
    time: dict[str, Timing]
    peak_bytes: dict[str, int]


def steps_per_comparison(rounds: int) -> int:
    """How often ``compare`` calls ``after_step``."""
    return 3 + 2 * (1 + rounds) + 2


def compare(
    source: Source,
    computations: Computations,
    plan: uk.Plan,
    rounds: int,
    after_step: Callable[[], object] = lambda: None,
    *,
    peaks: int = 3,
) -> Row:
    """Compute one loss and its gradients in both ways, check both against the oracle, and measure both.

    The tolerance comes from the naive computation in fp32 arithmetic: twice its error, plus a few ulp, since its error
    may happen to be nothing.

    Args:
        source: the loss and its batch.
        computations: of that loss.
        plan: how the fused loss is computed.
        rounds: timed runs.
        after_step: called ``steps_per_comparison(rounds)`` times; to show progress.
        peaks: runs of which the least memory is taken.

    Raises:
        Degenerate: when a true gradient is smaller than the rounding of naive fp32, as that of two equal samples is.
    """
    device = source.batch.target.device
    paradigm = source.loss.paradigm
    assert paradigm is not None
    try:
        loss, checks = _checks(source.batch, computations, after_step)
    except Degenerate as error:
        raise Degenerate(f"{paradigm.algorithm}: the data is degenerate: {error}") from None
    calls = {FUSED: computations.fused, NAIVE: computations.naive}
    time = interleaved_times(calls, device, rounds=rounds, after_call=after_step)
    peak_bytes = {}
    for name, call in calls.items():
        peak_bytes[name] = peak_extra_bytes(call, device, prepare=lambda: _release_kept_memory(plan), repeats=peaks)
        after_step()
    tokens = int(source.batch.valid.sum())
    return Row(paradigm.algorithm, paradigm.equations, source.data, tokens, loss, checks, time, peak_bytes)


def _release_kept_memory(plan: uk.Plan) -> None:
    """Free kept memory, so that the measurement includes the memory of the gradient."""
    if plan.backend is not None:
        backends.load(plan.backend).release_memory()


def _checks(
    batch: uk.Batch, computations: Computations, after_step: Callable[[], object]
) -> tuple[float, dict[str, Check]]:
    """The fused loss, its error, and the errors of its gradients."""
    true_loss, gradients = computations.exact()
    true_gradients = _at_tokens(gradients, batch)
    after_step()
    plain_loss, gradients = computations.plain()
    plain_gradients = _at_tokens(gradients, batch)
    # Losses of tokens are of order 1 and cancel where advantages do: an ulp is one of 1, not of what is left.
    loss_budget = budget(plain_loss, true_loss, ulps=ULPS, condition=condition_of(true_loss, computations.scale))
    for name, x in plain_gradients.items():
        if (lost := error(x.float(), true_gradients[name]).relative) > NO_DIGIT:
            raise Degenerate(f"naive fp32 has no digit of its {name} (relative error {lost:.1g})")
    tolerances = {
        name: budget(x.float(), true_gradients[name], ulps=ULPS).relative for name, x in plain_gradients.items()
    }
    del gradients, plain_gradients
    after_step()
    loss, gradients = computations.fused()
    checks = {"loss": Check(_error(loss, true_loss).largest, loss_budget.largest)}
    for name, x in _at_tokens(gradients, batch).items():
        checks[name] = Check(_error(x, true_gradients[name]).relative, tolerances[name])
    after_step()
    return loss.item(), checks


def _error(x: Tensor, truth: Tensor) -> Error:
    """``error``, or infinity if ``x`` is not finite: a broken kernel then has a row in the table."""
    infinite = float("inf")
    return error(x, truth) if bool(x.isfinite().all()) else Error(infinite, infinite, infinite)


def _at_tokens(gradients: Gradients, batch: uk.Batch) -> Gradients:
    """Gradients without the rows of ignored tokens, if they have a row per token; NaN if one of those is not 0."""

    def kept(gradient: Tensor) -> Tensor:
        if gradient.shape[:-1] != batch.target.shape:
            return gradient
        stray = gradient[~batch.valid].any()
        return torch.where(stray, torch.nan, gradient[batch.valid])

    return {name: kept(gradient) for name, gradient in gradients.items()}
