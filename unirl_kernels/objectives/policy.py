"""Policy gradients of tokens: surrogates of the return through the ratio r = pi / pi_old.

The log-ratio is bounded (``ratios.BOUND``), so that an advantage of 0 gives 0 for any two policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import AboveOne, Field, NonNegative, Share
from unirl_kernels.objectives.loss import Metrics, Objective, Paradigm
from unirl_kernels.objectives.penalties import KL
from unirl_kernels.objectives.ratios import clip_metrics, clipped, ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["Clip", "DualClip", "PolicyGradient", "Ratio", "Reinforce", "TwoSidedClip"]


def ratio_to_old(t: Tokens) -> Tensor:
    """r = pi / pi_old."""
    return ratio(t.logp - t.old_logp)


def ppo_kl(t: Tokens) -> dict[str, Tensor]:
    """``ppo_kl``: log pi_old / pi, estimate k1 of KL(pi_old || pi), as verl logs it."""
    return {"ppo_kl": t.old_logp - t.logp}


@dataclass(frozen=True)
class Reinforce(Objective):
    """-A log pi.  Williams 1992; verl ``gpg`` (Chu et al. 2025, arXiv:2504.02546), Kimi k1.5, OPMD."""

    def __call__(self, t: Tokens) -> Tensor:
        return -t.advantage * t.logp

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class Ratio(Objective):
    """Importance-weighted advantage, -r A with r = pi / pi_old.  Shao et al. 2024, eq. 12 as printed (no clip).

    Args:
        against: the field with the log-probabilities of the policy that sampled.
    """

    against: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return -ratio(t.logp - getattr(t, self.against)) * t.advantage

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return {"ppo_kl": getattr(t, self.against) - t.logp}


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

    low: Share = 0.2
    high: NonNegative = 0.2

    paradigm = Paradigm(
        "PPO",
        "(8)",
        "q ~ P_sft, o ~ pi_old",
        "model",
        "min(r A, clip(r, 1 - low, 1 + high) A)",
        "A on policy (11)",
    )

    def __call__(self, t: Tokens) -> Tensor:
        return clipped(ratio_to_old(t), t.advantage, self.low, self.high)

    def metrics(self, t: Tokens) -> Metrics:
        """``clip_fraction``: tokens whose gradient the clip removes; ``/low`` and ``/high`` by the side; ``ppo_kl``."""
        return clip_metrics(ratio_to_old(t), t.advantage, self.low, self.high) | ppo_kl(t)


@dataclass(frozen=True)
class DualClip(Objective):
    """``Clip`` whose loss is at most -c A where A < 0.

    Source: Ye et al. 2020 (arXiv:1912.09729); verl ``vanilla``, AReaL, slime, NeMo RL, OpenRLHF.

    Args:
        low, high: as in ``Clip``.
        c: the largest ratio that counts where A < 0, > 1.
    """

    low: Share = 0.2
    high: NonNegative = 0.2
    c: AboveOne = 3.0

    def __call__(self, t: Tokens) -> Tensor:
        loss = clipped(ratio_to_old(t), t.advantage, self.low, self.high)
        return torch.where(t.advantage < 0, torch.minimum(loss, -self.c * t.advantage), loss)

    def metrics(self, t: Tokens) -> Metrics:
        """Those of ``Clip``, and ``clip_fraction/dual``: tokens above c with A < 0."""
        r = ratio_to_old(t)
        dual = ((r > self.c) & (t.advantage < 0)).to(r.dtype)
        return clip_metrics(r, t.advantage, self.low, self.high) | {"clip_fraction/dual": dual} | ppo_kl(t)


@dataclass(frozen=True)
class TwoSidedClip(Objective):
    """-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A), which also bounds the ratio where A < 0.

    Source: Prime Intellect 2025 (INTELLECT-2, arXiv:2505.07291); TRL ``delta``.

    Args:
        low, high: as in ``Clip``.
        delta: the largest ratio that counts, > 1.
    """

    low: Share = 0.2
    high: NonNegative = 0.2
    delta: AboveOne = 4.0

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio_to_old(t)
        unclipped = r.clamp(max=self.delta) * t.advantage
        return -torch.minimum(unclipped, r.clamp(1 - self.low, 1 + self.high) * t.advantage)

    def metrics(self, t: Tokens) -> Metrics:
        """Those of ``Clip``."""
        return clip_metrics(ratio_to_old(t), t.advantage, self.low, self.high) | ppo_kl(t)


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """A surrogate of the return and, unless None, a penalty: GRPO.

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 12, with gradient coefficient (15).

    Args:
        surrogate: ``Clip``, ``Ratio`` or another objective of token scope.
        kl: the penalty; None for none, and then no ``ref_logp`` is read.
    """

    surrogate: Objective = Clip()
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

    def metrics(self, t: Tokens) -> Metrics:
        """Those of the surrogate."""
        return self.surrogate.metrics(t)
