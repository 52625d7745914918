"""How large an error may be: computed from eager fp32 PyTorch and the truth, never chosen.

Eager PyTorch is run several times on the same rows, each time with another rounding of z where z rounds at all, so
that one lucky run does not set the budget. A statistic may err twice as much as the worst of them, and a few ulp.
How much of that an objective makes of it is found by running the objective, in fp32, on statistics that err so much
in every direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz import naive
from tests.fuzz.inputs import Inputs
from tests.fuzz.naive import Statistics

RUNS = 4
ULPS = 8
OWN = torch.finfo(torch.float64).eps


def row_dtype(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "float64" else torch.float32


def difference(x: Tensor, truth: Tensor) -> Tensor:
    """|x - truth| in fp64: 0 where both are the same infinity or NaN, inf where only one is finite."""
    x = x.double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    apart = (x - truth).abs()
    return torch.where(same, 0.0, torch.where(apart.isfinite(), apart, torch.inf))


@dataclass(frozen=True)
class Rows:
    """Truth and budgets of rows of logits, [T, V].

    Args:
        stats: the truth, float64 [T] each; 0 at ignored positions.
        basis: [3, T, V] float64, derivatives of logp, entropy, lse with respect to the logits x.
        stats_allowed: [3, T], errors that the statistics may have.
        basis_allowed: [3, T], errors that elements of a row of the basis may have.
        plain: bases of the eager runs, in the rows' dtype.
        observations, observations_allowed: the truth of log_sum_sq_probs and mean_logit, and their budgets; [T].
    """

    stats: Statistics
    basis: Tensor
    stats_allowed: Tensor
    basis_allowed: Tensor
    plain: list[Tensor]
    observations: naive.Observations
    observations_allowed: tuple[Tensor, Tensor]


def rows_of(x: Tensor, plain: Sequence[Tensor], inputs: Inputs) -> Rows:
    """Truth and budgets.

    Args:
        x: [T, V] float64, the logits; anything at ignored positions.
        plain: ``RUNS`` times the same logits in the rows' dtype, as plain PyTorch has them.
        inputs: the case's.
    """
    exact, other = _measured(x, inputs, None), _measured(x, inputs, 1)
    runs = [_measured(p, inputs, None if k == 0 else 1000 + k) for k, p in enumerate(plain)]
    limits = torch.finfo(plain[0].dtype)

    def allowed(of: Callable[[_Measured], Tensor], size: Tensor, least: Tensor) -> Tensor:
        truth = of(exact)
        errors = torch.stack([difference(of(run), truth) for run in (*runs, other)])
        return 2 * errors.amax(0) + ULPS * limits.eps * _finite(size) + least

    # What exp makes 0, times the size of its logarithm; and the roundings of the truth itself.
    lost = limits.smallest_normal * 128 * x.shape[-1] + ULPS * OWN * (1 + exact.entropy_size)
    slope = abs(inputs.case.scale) / inputs.row_temperature
    stats = torch.stack([s.abs() for s in exact.stats])
    stats[2] = torch.maximum(stats[2], exact.z.amax(-1).abs()) if x.shape[-1] else stats[2]
    basis = allowed(lambda run: run.basis, exact.basis.abs().amax(-1, keepdim=True), (lost * slope).unsqueeze(-1))
    observations = [
        allowed(lambda run: run.observations[0], exact.observations[0].abs(), lost),
        allowed(lambda run: run.observations[1], exact.z.abs().mean(-1), lost),
    ]
    return Rows(
        exact.stats,
        exact.basis,
        allowed(lambda run: torch.stack(list(run.stats)), stats, lost),
        basis.amax(-1),
        [run.basis for run in runs],
        exact.observations,
        (observations[0], observations[1]),
    )


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


@dataclass(frozen=True)
class _Measured:
    z: Tensor
    stats: Statistics
    basis: Tensor
    observations: naive.Observations

    @property
    def entropy_size(self) -> Tensor:
        """[T], size of what entropies are summed from where p is not 0."""
        return self.stats.entropy.nan_to_num()


def _measured(x: Tensor, inputs: Inputs, seed: int | None) -> _Measured:
    """Statistics and their derivatives by autograd.

    Args:
        seed: of another rounding of z; None as it comes.
    """
    leaf = torch.where(inputs.valid.unsqueeze(-1), x, 0).requires_grad_()
    used = leaf
    random = None if seed is None else torch.Generator().manual_seed(seed)
    if random is not None and inputs.case.softcap is not None:
        used = leaf + _rounding(leaf, random)
    z = naive.readout(used, inputs, inputs.row_temperature)
    if random is not None:
        z = z + torch.where(_rounds(z, leaf, inputs), _rounding(z, random), 0)
    stats = naive.statistics(z, inputs.flat_target)
    basis = torch.stack([torch.autograd.grad(s.sum(), leaf, retain_graph=True)[0] for s in stats])
    with torch.no_grad():
        observed = naive.observations(leaf, z, inputs.case.scale)
    zeroed = Statistics(*(torch.where(inputs.valid, s.detach(), 0) for s in stats))
    return _Measured(z.detach(), zeroed, torch.where(inputs.valid.unsqueeze(-1), basis, 0), observed)


def _rounds(z: Tensor, x: Tensor, inputs: Inputs) -> Tensor:
    """Where z was rounded; for fp64, where it may have been."""
    with torch.no_grad():
        if z.dtype == torch.float64:
            return (z.abs() != x.abs()) | torch.tensor(inputs.case.softcap is not None)
        return z.double() != naive.readout(x.double(), inputs, inputs.row_temperature)


def _rounding(x: Tensor, random: torch.Generator) -> Tensor:
    """An ulp of each element up or down, or nothing."""
    steps = torch.randint(-1, 2, x.shape, generator=random)
    return torch.where(x.isfinite(), x * (torch.finfo(x.dtype).eps * steps), 0).detach()


@dataclass(frozen=True)
class Evaluated:
    """A loss and its derivatives with respect to the statistics.

    Args:
        terms: [n], values of the terms.
        derivatives: [3, T].
        size: [], sum of the sizes of the contributions.
    """

    terms: Tensor
    derivatives: Tensor
    size: Tensor


@dataclass(frozen=True)
class Coefficients:
    """Truth and budgets of a loss of statistics.

    Args:
        truth: at the true statistics.
        terms_allowed: [n].
        derivatives_allowed: [3, T].
    """

    truth: Evaluated
    terms_allowed: Tensor
    derivatives_allowed: Tensor


def coefficients(evaluate: Callable[[Statistics], Evaluated], rows: Rows, dtype: torch.dtype, lse: bool) -> Coefficients:
    """Truth and budgets of a loss.

    Args:
        evaluate: the loss, in the dtype of the statistics that it is given.
        rows: the truth of the statistics, and their budgets.
        dtype: of the rows.
        lse: whether the loss reads it.
    """
    truth = evaluate(rows.stats)
    eps = torch.finfo(dtype).eps
    terms, derivatives = torch.zeros_like(truth.terms), torch.zeros_like(truth.derivatives)
    for signs in itertools.product((1, -1), (1, -1), (1, -1) if lse else (1,)):
        changed = _changed(rows, [*signs, 1][:3], dtype)
        run = evaluate(changed)
        terms = torch.maximum(terms, difference(run.terms, truth.terms))
        derivatives = torch.maximum(derivatives, difference(run.derivatives, truth.derivatives))
    terms = terms + ULPS * eps * _finite(truth.size)
    return Coefficients(truth, terms, derivatives + ULPS * eps * _finite(truth.derivatives.abs()))


def _changed(rows: Rows, signs: Sequence[int], dtype: torch.dtype) -> Statistics:
    changed = [
        torch.where(s.isfinite() & a.isfinite(), s + sign * a, s)
        for s, a, sign in zip(rows.stats, rows.stats_allowed, signs, strict=True)
    ]
    logp, entropy, lse = (x.to(dtype) for x in changed)
    return Statistics(logp.clamp(max=0), entropy.clamp(min=0), lse)
