"""Policy gradients: surrogates of the return, and the penalty for leaving the reference policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import check_number
from unirl_kernels.objectives.loss import Objective, Paradigm
from unirl_kernels.objectives.tokens import Tokens


@dataclass(frozen=True)
class Ratio(Objective):
    """Importance-weighted advantage, -r A with r = pi / pi_old.  Shao et al. 2024, eq. 12 as printed (no clip)."""

    def __call__(self, t: Tokens) -> Tensor:
        return -torch.exp(t.logp - t.old_logp) * t.advantage


@dataclass(frozen=True)
class Clip(Objective):
    """PPO's clipped surrogate, -min(r A, clip(r, 1 - low, 1 + high) A) with r = pi / pi_old.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; Shao et al. 2024 (arXiv:2402.03300v3), eq. 8.

    Args:
        low, high: how far the ratio may fall below and rise above 1; low in [0, 1], high >= 0.

    Raises:
        TypeError: when a bound is not a number.
        ValueError: when a bound is outside its range.
    """

    low: float = 0.2
    high: float = 0.2

    paradigm = Paradigm(
        "PPO",
        "(8)",
        "q ~ P_sft, o ~ pi_old",
        "model",
        "min(r A, clip(r, 1 - low, 1 + high) A)",
        "A on policy (11)",
    )

    def __post_init__(self) -> None:
        check_number("low", self.low)
        check_number("high", self.high)
        if not 0 <= self.low <= 1:
            raise ValueError(f"low must lie in [0, 1], got {self.low}")
        if not self.high >= 0:
            raise ValueError(f"high must be at least 0, got {self.high}")

    def __call__(self, t: Tokens) -> Tensor:
        ratio = torch.exp(t.logp - t.old_logp)
        return -torch.minimum(ratio * t.advantage, ratio.clamp(1 - self.low, 1 + self.high) * t.advantage)

    def metrics(self, t: Tokens) -> dict[str, Tensor]:
        """``clip_fraction``: tokens whose gradient the clip removes."""
        ratio = torch.exp(t.logp - t.old_logp)
        above = (ratio > 1 + self.high) & (t.advantage > 0)
        below = (ratio < 1 - self.low) & (t.advantage < 0)
        return {"clip_fraction": (above | below).to(ratio.dtype)}


@dataclass(frozen=True)
class KL(Objective):
    """Penalty beta (pi_ref / pi - log pi_ref / pi - 1), an unbiased estimate of KL(pi || pi_ref), >= 0.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 4 of section 4.1.1; Schulman 2020, estimator k3.

    Args:
        beta: the coefficient, >= 0.

    Raises:
        TypeError: when ``beta`` is not a number.
        ValueError: when ``beta`` is negative.
    """

    beta: float = 0.04

    def __post_init__(self) -> None:
        check_number("beta", self.beta)
        if not self.beta >= 0:
            raise ValueError(f"beta must be at least 0, got {self.beta}")

    def __call__(self, t: Tokens) -> Tensor:
        return self.beta * kl_estimate(t)


def kl_estimate(t: Tokens) -> Tensor:
    """KL(pi || pi_ref) per token, estimator k3: exp(d) - d - 1 with d = ref_logp - logp."""
    difference = t.ref_logp - t.logp
    return torch.expm1(difference) - difference


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """A surrogate of the return and, unless None, a penalty: GRPO.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 12, with gradient coefficient (15).

    Args:
        surrogate: ``Clip`` or ``Ratio``.
        kl: the penalty; None for none, and then no ``ref_logp`` is read.
    """

    surrogate: Clip | Ratio = Clip()
    kl: KL | None = KL()

    paradigm = Paradigm(
        "GRPO",
        "(12), (15)",
        "q ~ P_sft, {o_i} ~ pi_old",
        "model",
        "clipped r A - beta (pi_ref / pi - log pi_ref / pi - 1)",
        "A + beta (pi_ref / pi - 1) on policy (15)",
    )

    def __call__(self, t: Tokens) -> Tensor:
        loss = self.surrogate(t)
        return loss if self.kl is None else loss + self.kl(t)

    def metrics(self, t: Tokens) -> dict[str, Tensor]:
        return self.surrogate.metrics(t) if isinstance(self.surrogate, Clip) else {}
