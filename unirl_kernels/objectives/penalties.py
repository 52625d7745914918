"""Penalties: estimates of the divergence from another policy, and entropy. They are added to a loss as terms of a sum.

uk.ppo() + 0.04 * uk.Loss(K3()) - 0.01 * uk.Loss(Entropy(), uk.TokenMean())
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Field, NonNegative, Number, Positive
from unirl_kernels.objectives.loss import Objective
from unirl_kernels.objectives.ratios import k3
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "K1",
    "K2",
    "K3",
    "KL",
    "AbsoluteKL",
    "Entropy",
    "EntropyTarget",
    "LowVarianceKL",
    "StraightThrough",
    "ZLoss",
]


@dataclass(frozen=True)
class KL(Objective):
    """Penalty beta (pi_ref / pi - log pi_ref / pi - 1), an unbiased estimate of KL(pi || pi_ref), >= 0.

    log pi_ref / pi is bounded from above (``ratios.BOUND``).

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 4 of section 4.1.1; Schulman 2020, estimator k3.

    Args:
        beta: the coefficient, >= 0.

    Raises:
        TypeError: when ``beta`` is not a number.
        ValueError: when ``beta`` is negative.
    """

    beta: NonNegative = 0.04

    def __call__(self, t: Tokens) -> Tensor:
        return self.beta * kl_estimate(t)


def kl_estimate(t: Tokens) -> Tensor:
    """KL(pi || pi_ref) per token, estimator k3: exp(d) - d - 1 with d = ref_logp - logp."""
    return k3(t.ref_logp - t.logp)


@dataclass(frozen=True)
class K1(Objective):
    """log pi / pi_ref, an unbiased estimate of KL(pi || pi_ref).  Schulman 2020, "Approximating KL divergence".

    On samples of pi its gradient has expectation 0 (Tang and Munos 2025, arXiv:2506.09477): as a loss it needs the
    ratio, ``ImportanceWeighted(K1())``.

    Args:
        against: the field with the other policy's log-probabilities.
    """

    against: Field = "ref_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return t.logp - getattr(t, self.against)


@dataclass(frozen=True)
class AbsoluteKL(Objective):
    """|log pi / pi_ref|.  verl, SkyRL, ROLL: ``abs``.

    Args:
        against: as in ``K1``.
    """

    against: Field = "ref_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return torch.abs(t.logp - getattr(t, self.against))


@dataclass(frozen=True)
class K2(Objective):
    """1/2 (log pi / pi_ref)^2, whose gradient is that of KL(pi || pi_ref) in expectation.  Schulman 2020.

    With ``against="old_logp"`` it is the penalty of Kimi k1.5 (Kimi Team 2025, arXiv:2501.12599) and of DRO
    (Richemond et al. 2024, arXiv:2405.19107): -A log pi + tau K2.

    Args:
        against: as in ``K1``.
    """

    against: Field = "ref_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return 0.5 * torch.square(t.logp - getattr(t, self.against))


@dataclass(frozen=True)
class K3(Objective):
    """pi_ref / pi - log pi_ref / pi - 1, an unbiased estimate of KL(pi || pi_ref), >= 0.  Schulman 2020.

    log pi_ref / pi is bounded from above (``ratios.BOUND``).

    Args:
        against: as in ``K1``.
    """

    against: Field = "ref_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return k3(getattr(t, self.against) - t.logp)


@dataclass(frozen=True)
class LowVarianceKL(Objective):
    """clip(e^d - d - 1, -most, most) with d = clip(log pi_ref / pi, -bound, bound).  verl, NeMo RL, ms-swift.

    Args:
        against: as in ``K1``.
        bound: of the log-ratio, > 0.
        most: of the estimate, > 0.
    """

    against: Field = "ref_logp"
    bound: Positive = 20.0
    most: Positive = 10.0

    def __call__(self, t: Tokens) -> Tensor:
        difference = (getattr(t, self.against) - t.logp).clamp(-self.bound, self.bound)
        return (torch.expm1(difference) - difference).clamp(-self.most, self.most)


@dataclass(frozen=True)
class StraightThrough(Objective):
    """The value of one estimate with the gradient of another.  verl's ``k1+``, ``k3+``: K1 or K3 with K2's gradient.

    Args:
        value, gradient: objectives of token scope.
    """

    value: Objective = K3()
    gradient: Objective = K2()

    def __call__(self, t: Tokens) -> Tensor:
        gradient = self.gradient(t)
        return gradient - gradient.detach() + self.value(t).detach()


@dataclass(frozen=True)
class Entropy(Objective):
    """H of the token's distribution, nats. Subtract it for a bonus (confidence penalty: Pereyra et al. 2017,
    arXiv:1701.06548).
    """

    def __call__(self, t: Tokens) -> Tensor:
        return t.entropy


@dataclass(frozen=True)
class EntropyTarget(Objective):
    """(H - target)^2, entropy held near a target.

    Args:
        target: nats.
    """

    target: Number = 2.0

    def __call__(self, t: Tokens) -> Tensor:
        return torch.square(t.entropy - self.target)


@dataclass(frozen=True)
class ZLoss(Objective):
    """lse^2, which keeps the normaliser near 1.  Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), section 5."""

    def __call__(self, t: Tokens) -> Tensor:
        return torch.square(t.lse)
