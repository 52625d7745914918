"""Fused against naive on the same logits: value and gradient against the fp64 oracle, time, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels import backends, reference
from unirl_kernels.accuracy import Error, budget, condition_of, error
from unirl_kernels.demo.sources import Source
from unirl_kernels.measure import Timing, interleaved_times, peak_extra_bytes

FUSED, NAIVE = "fused", "naive"
ULPS = 4
"""What an error may be beyond twice that of naive fp32: a few units in the last place."""

LossAndGradient = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Check:
    """Distance from the fp64 oracle, and how large it may be."""

    error: float
    tolerance: float

    @property
    def failed(self) -> bool:
        return not self.error <= self.tolerance  # so that NaN fails


@dataclass(frozen=True)
class Row:
    """A row of the demo's table.

    Args:
        algorithm, equation: from the paradigm's table.
        data: where the samples come from.
        tokens: valid ones, those that the loss counts.
        loss: the fused one.
        loss_check: absolute error.
        grad_check: error of the logits' gradient, relative L2.
        time: of loss and gradient, by ``FUSED`` and ``NAIVE``.
        peak_bytes: extra memory of the same, the gradient included.
    """

    algorithm: str
    equation: str
    data: str
    tokens: int
    loss: float
    loss_check: Check
    grad_check: Check
    time: dict[str, Timing]
    peak_bytes: dict[str, int]


def steps_per_comparison(rounds: int) -> int:
    """How often ``compare`` calls ``after_step``."""
    return 3 + 2 * (1 + rounds) + 2


def compare(
    source: Source, logits: Tensor, plan: uk.Plan, rounds: int, after_step: Callable[[], object] = lambda: None
) -> Row:
    """Compute one loss and its gradient both ways, check them against the oracle, and measure both.

    Naive is ``reference`` in the logits' own dtype, as people write it. The tolerance comes from the same in fp32
    arithmetic: twice its error, plus a few ulp, since its error may happen to be nothing.

    Args:
        source: the loss and its batch.
        logits: [S, L, V], detached.
        plan: how the fused loss is computed.
        rounds: timed runs.
        after_step: called ``steps_per_comparison(rounds)`` times; to show progress.
    """
    leaf = logits.detach().requires_grad_()
    calls: dict[str, LossAndGradient] = {
        FUSED: lambda: _with_gradient(uk.fused_loss(leaf, source.batch, source.loss, plan=plan).loss, leaf),
        NAIVE: lambda: _with_gradient(reference.loss(source.algorithm, leaf, source.batch), leaf),
    }
    loss, loss_check, grad_check = _checks(source, leaf, calls[FUSED], after_step)
    time = interleaved_times(calls, logits.device, rounds=rounds, after_call=after_step)
    peak_bytes = {}
    for name, call in calls.items():
        peak_bytes[name] = peak_extra_bytes(call, logits.device, prepare=lambda: _release_kept_memory(plan), repeats=3)
        after_step()
    paradigm = source.loss.paradigm
    assert paradigm is not None
    return Row(
        paradigm.algorithm,
        paradigm.equations,
        source.data,
        int(source.batch.valid.sum()),
        loss,
        loss_check,
        grad_check,
        time,
        peak_bytes,
    )


def _release_kept_memory(plan: uk.Plan) -> None:
    """Memory that a backend keeps for the next gradient would hide that a gradient needs it."""
    if plan.backend is not None:
        backends.load(plan.backend).release_memory()


def _with_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    # Not backward(): it would copy a gradient that somebody else holds into leaf.grad.
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _checks(
    source: Source, leaf: Tensor, fused: LossAndGradient, after_step: Callable[[], object]
) -> tuple[float, Check, Check]:
    """The fused loss, its error, and the error of its gradient."""
    exact = leaf.detach().double().requires_grad_()
    true_loss, true_gradient = _with_gradient(reference.loss(source.algorithm, exact, source.batch), exact)
    true_gradient = _at_tokens(true_gradient, source.batch)
    del exact
    after_step()
    naive_loss, naive_gradient = _with_gradient(reference.loss(source.algorithm, leaf.float(), source.batch), leaf)
    naive_gradient = _at_tokens(naive_gradient, source.batch)
    # Losses of tokens are of order 1 and cancel where advantages do: an ulp is one of 1, not of what is left.
    loss_budget = budget(naive_loss, true_loss, ulps=ULPS, condition=condition_of(true_loss))
    gradient_budget = budget(naive_gradient.float(), true_gradient, ulps=ULPS)
    del naive_gradient
    after_step()
    loss, gradient = fused()
    checks = (
        Check(_error(loss, true_loss).largest, loss_budget.largest),
        Check(_error(_at_tokens(gradient, source.batch), true_gradient).relative, gradient_budget.relative),
    )
    after_step()
    return loss.item(), *checks


def _error(x: Tensor, truth: Tensor) -> Error:
    """As ``error``; infinite where ``x`` is not finite, so that a broken kernel stands in the table like any other."""
    infinite = float("inf")
    return error(x, truth) if bool(x.isfinite().all()) else Error(infinite, infinite, infinite)


def _at_tokens(gradient: Tensor, batch: uk.Batch) -> Tensor:
    """[tokens, V]: the rows of the valid tokens; NaN when another row is not exactly zero."""
    stray = gradient[~batch.valid].any()
    return torch.where(stray, torch.nan, gradient[batch.valid])
