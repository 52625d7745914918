"""How large an error may be: computed from eager fp32 PyTorch and the truth, never chosen.

Eager PyTorch is run several times on the same rows, each time with another rounding of z where z rounds at all, so
that one lucky run does not set the budget. A statistic may err twice as much as the worst of them, and a few ulp.
How much of that an objective makes of it is found by running the objective, in fp32, on statistics that err so much
in every direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzz import naive
from tests.fuzz.inputs import Inputs
from tests.fuzz.naive import Statistics

RUNS = 8
ULPS = 8
OWN = torch.finfo(torch.float64).eps
"""An ulp of the truth."""


def row_dtype(dtype: str) -> torch.dtype:
    return torch.float64 if dtype == "float64" else torch.float32


def difference(x: Tensor, truth: Tensor) -> Tensor:
    """|x - truth| in fp64: 0 where both are the same infinity or NaN, inf where only one is finite."""
    x = x.double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    apart = (x - truth).abs()
    return torch.where(same, 0.0, torch.where(apart.isfinite(), apart, torch.inf))


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


@dataclass(frozen=True)
class Rows:
    """Truth and budgets of rows of logits, [T, V].

    Args:
        stats: the truth, float64 [T] each; 0 at ignored positions.
        basis: [3, T, V] float64, derivatives of logp, entropy, lse with respect to the logits x.
        stats_allowed: [3, T], errors that the statistics may have.
        basis_allowed: [3, T], errors that elements of a row of the basis may have.
        plain: [RUNS, 3, T, V], bases of the eager runs, in the rows' dtype.
        observations, observations_allowed: log_sum_sq_probs, mean_logit (and argmax); [T] each.
    """

    stats: Statistics
    basis: Tensor
    stats_allowed: Tensor
    basis_allowed: Tensor
    plain: Tensor
    observations: naive.Observations
    observations_allowed: tuple[Tensor, Tensor]


def rows_of(x: Tensor, plain: Tensor, inputs: Inputs) -> Rows:
    """Truth and budgets.

    Args:
        x: [T, V] float64, the logits; anything at ignored positions.
        plain: [RUNS, T, V], the same logits in the rows' dtype, as plain PyTorch has them.
        inputs: the case's.
    """
    exact, runs = _measured(x.expand(2, -1, -1), inputs), _measured(plain, inputs)
    limits, vocab = torch.finfo(plain.dtype), x.shape[-1]
    slope = abs(inputs.case.scale) / inputs.row_temperature
    # What exp makes 0, times the size of its logarithm; and the roundings of the truth itself.
    lost = limits.smallest_normal * 128 * vocab + (ULPS + vocab) * OWN * (1 + exact.stats[0, 1].nan_to_num())

    def allowed(found: Tensor, truths: Tensor, size: Tensor, least: Tensor) -> Tensor:
        errors = torch.maximum(difference(found, truths[0]).amax(0), difference(truths[1], truths[0]))
        return 2 * errors + ULPS * limits.eps * _finite(size) + least

    # Sums of exponentials are 1 at least: their ulps are those of 1, or of a larger log-probability.
    sizes = exact.stats[0].abs().clamp(min=1)
    sizes[2] = torch.maximum(sizes[2], exact.z[0].amax(-1).abs())
    observed_sizes = (exact.observations[0][0].abs().clamp(min=1), exact.z[0].abs().mean(-1))
    # p itself is right to two ulps: as p_y -> 1 that shows in 1 - p_y.
    of_p = 2 * limits.eps * (exact.p * exact.slope[0]).amax(-1)
    if inputs.case.softcap is not None:  # and 1 - tanh^2, where tanh is right to two
        of_p = of_p + 4 * limits.eps * slope
    of_basis = allowed(runs.basis, exact.basis, _basis_sizes(exact), (lost * slope + of_p).unsqueeze(-1))
    return Rows(
        Statistics(*exact.stats[0].unbind()),
        exact.basis[0],
        allowed(runs.stats, exact.stats, sizes, lost),
        of_basis.amax(-1),
        runs.basis,
        naive.Observations(*(o[0] for o in exact.observations)),
        (
            allowed(runs.observations[0], exact.observations[0], observed_sizes[0], lost),
            allowed(runs.observations[1], exact.observations[1], observed_sizes[1], lost),
        ),
    )


def _basis_sizes(exact: _Measured) -> Tensor:
    """[3, T, 1]: the largest element of a row; of the entropy's derivative its parts -p log p and -p H."""
    sizes = exact.basis[0].abs().amax(-1, keepdim=True)
    surprise = exact.log_p.abs() + exact.stats[0, 1].unsqueeze(-1)
    parts = torch.where(exact.p > 0, exact.p * surprise, 0.0) * exact.slope[0]
    return torch.stack([sizes[0], torch.maximum(sizes[1], parts.amax(-1, keepdim=True)), sizes[2]])


@dataclass(frozen=True)
class _Measured:
    """Of several runs, along the first dimension."""

    z: Tensor  # [n, T, V]
    slope: Tensor  # [n, T, V], |dz/dx|
    stats: Tensor  # [n, 3, T]
    basis: Tensor  # [n, 3, T, V]
    observations: naive.Observations  # [n, T]

    @property
    def log_p(self) -> Tensor:
        """[T, V], of the first run."""
        return (self.z[0] - self.stats[0, 2].unsqueeze(-1)).clamp(max=0)

    @property
    def p(self) -> Tensor:
        return self.log_p.exp().nan_to_num()


def _measured(x: Tensor, inputs: Inputs) -> _Measured:
    """Statistics and their derivatives by autograd: of the first run as they come, of the others with z, and what
    tanh is taken of, rounded in other ways.

    Args:
        x: [n, T, V].
    """
    used = torch.where(inputs.valid.unsqueeze(-1), x, 0)
    # A copy for each statistic, and one for z: one pass backwards finds all derivatives.
    leaf = used.unsqueeze(1).repeat(1, 4, 1, 1).requires_grad_()
    random = torch.Generator().manual_seed(len(x))
    capped = inputs.case.softcap is not None
    moved = leaf + _rounding(used, 1, random).unsqueeze(1) if capped else leaf
    z = naive.readout(moved, inputs, inputs.row_temperature)
    # tanh is right to two ulps.
    rounding = torch.where(_rounds(z[:, 0], used, inputs), _rounding(z[:, 0].detach(), 1 + capped, random), 0)
    z = z + rounding.unsqueeze(1)
    stats = naive.statistics(z, inputs.flat_target)
    parts = [stats[k][:, k] for k in range(3)]
    (found,) = torch.autograd.grad(sum(s.sum() for s in parts) + z[:, 3].sum(), leaf)
    with torch.no_grad():
        z = z[:, 0].detach()
        observed = naive.observations(used, z, inputs.case.scale)
        kept = torch.where(inputs.valid, torch.stack(parts, 1).detach(), 0)
        return _Measured(z, found[:, 3].abs(), kept, torch.where(inputs.valid.unsqueeze(-1), found[:, :3], 0), observed)


def _rounds(z: Tensor, x: Tensor, inputs: Inputs) -> Tensor:
    """Where z was rounded; for fp64, where it may have been."""
    with torch.no_grad():
        if z.dtype == torch.float64:
            return (z.abs() != x.abs()) | torch.tensor(inputs.case.softcap is not None)
        return z.double() != naive.readout(x.double(), inputs, inputs.row_temperature)


def _rounding(x: Tensor, ulps: int, random: torch.Generator) -> Tensor:
    """So many ulps of each element up or down, or nothing; nothing in the first run."""
    steps = torch.randint(-1, 2, x.shape, generator=random) * ulps
    steps[0] = 0
    return torch.where(x.isfinite(), x * (torch.finfo(x.dtype).eps * steps), 0)


@dataclass(frozen=True)
class Evaluated:
    """Losses and their derivatives with respect to the statistics, of n batches.

    Args:
        parts: [n, T] or, of pairs, [n, S / 2], for each term: what each token adds to it.
        derivatives: [n, 3, T].
        weight: [T], how much a token weighs.
    """

    parts: tuple[Tensor, ...]
    derivatives: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Coefficients:
    """Truth and budgets of a loss of statistics.

    Args:
        terms, terms_allowed: [terms].
        derivatives, derivatives_allowed: [3, T].
    """

    terms: Tensor
    terms_allowed: Tensor
    derivatives: Tensor
    derivatives_allowed: Tensor


Evaluate = Callable[[Statistics, bool], Evaluated]
"""A loss, in the dtype of the statistics that it is given, [n, T] each; whether each of n rounds in another way."""


def coefficients(evaluate: Evaluate, rows: Rows, dtype: torch.dtype) -> Coefficients:
    """Truth and budgets of a loss.

    Args:
        evaluate: the loss.
        rows: the truth of the statistics, and their budgets.
        dtype: of the rows.
    """
    truth = evaluate(Statistics(*(s.unsqueeze(0) for s in rows.stats)), False)
    eps = torch.finfo(dtype).eps
    changed = _changed(rows)
    narrow, runs = Statistics(*(s.float() for s in changed)), len(changed.logp)
    exact = evaluate(Statistics(*(torch.cat([s, n.double()]) for s, n in zip(changed, narrow, strict=True))), False)
    rounded = evaluate(narrow, True)
    other = evaluate(changed, True) if dtype == torch.float64 else None

    def allowed(of: Callable[[Evaluated], Tensor]) -> Tensor:
        # |f32(s') - f(s)| is at most |f(s') - f(s)| + |f32(s') - f(s')|: what wrong statistics do, and what rounding
        # does. Rounding may do twice as much as in the worst eager run; in fp64 it does as much less as its eps is,
        # unless it decides a comparison.
        true, exactly = of(truth), of(exact)
        used = exactly if other is None else exactly[:runs]
        moved = difference(used, true).amax(0)
        if other is not None:
            moved = moved + 2 * difference(of(other), used).amax(0)
        return moved + 2 * eps / torch.finfo(torch.float32).eps * difference(of(rounded), exactly[runs:]).amax(0)

    # Each token errs by itself.
    terms = [part[0].sum() for part in truth.parts]
    terms_allowed = [
        allowed(lambda of, k=k: of.parts[k]).sum() + ULPS * eps * _finite(part[0].abs().sum())
        for k, part in enumerate(truth.parts)
    ]
    # Slopes such as 1 - tanh^2 are differences of numbers of size 1, right to two ulps of it; the truth's, too.
    slopes = (2 * eps + ULPS * OWN) * truth.weight
    derivatives = allowed(lambda of: of.derivatives) + ULPS * eps * _finite(truth.derivatives[0].abs()) + slopes
    return Coefficients(torch.stack(terms), torch.stack(terms_allowed), truth.derivatives[0], derivatives)


def _changed(rows: Rows) -> Statistics:
    """[25, T] each: the statistics, off by what they may be in every direction; as they are; and, since one of
    these may be lucky where differences cancel, off by parts of it."""
    corners = torch.tensor([(0.0, 0.0, 0.0), *itertools.product((1.0, -1.0), repeat=3)], dtype=torch.float64)
    stats, may = torch.stack(list(rows.stats)), rows.stats_allowed
    parts = 2 * torch.rand(16, *stats.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    step = torch.where(stats.isfinite() & may.isfinite(), may, 0)
    off = torch.cat([corners.unsqueeze(-1).expand(-1, -1, stats.shape[-1]), parts])
    logp, entropy, lse = (stats + off * step).unbind(1)
    return Statistics(logp.clamp(max=0), entropy.clamp(min=0), lse)
