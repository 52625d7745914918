"""Policy gradients through log pi: the ratio is a weight without a gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Field, NonNegative, Positive, Share
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["CISPO", "TOPR", "ImportanceWeighted", "MaskedCISPO", "ShapedLikelihood"]


@dataclass(frozen=True)
class CISPO(Objective):
    """-sg(clip(r, lower, upper)) A log pi with r = pi / pi_old.

    Source: MiniMax 2025 (arXiv:2506.13585). Upper alone: TRL, Liger, ScaleRL; both: verl,
    SkyRL. The clamped REINFORCE of torchforge is (0.1, 10), truncated importance sampling of ROLL (0, 1).

    Args:
        lower, upper: of the ratio itself, >= 0.
        against: the field with the log-probabilities of the policy that sampled.
    """

    lower: NonNegative = 0.0
    upper: NonNegative = 5.0
    against: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return -self._ratio(t).clamp(self.lower, self.upper).detach() * t.advantage * t.logp

    def _ratio(self, t: Tokens) -> Tensor:
        return ratio(t.logp - getattr(t, self.against))

    def metrics(self, t: Tokens) -> Metrics:
        """``clip_fraction``: tokens outside the bounds; ``/high``: above them with A > 0; ``ppo_kl``."""
        r = self._ratio(t)
        outside, above = (r < self.lower) | (r > self.upper), (r > self.upper) & (t.advantage > 0)
        named = {"clip_fraction": outside, "clip_fraction/high": above}
        return {name: x.to(r.dtype) for name, x in named.items()} | {"ppo_kl": getattr(t, self.against) - t.logp}


@dataclass(frozen=True)
class MaskedCISPO(Objective):
    """-sg(r) A log pi, 0 where PPO's clip would cut: r > 1 + high with A > 0, r < 1 - low with A < 0.

    Source: MiniMax 2025 (arXiv:2506.13585), the form with a mask; ROLL ``cispo_use_unified_mask``.

    Args:
        low, high: as in ``Clip``.
    """

    low: Share = 0.2
    high: NonNegative = 0.2

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio(t.logp - t.old_logp).detach()
        cut = ((r > 1 + self.high) & (t.advantage > 0)) | ((r < 1 - self.low) & (t.advantage < 0))
        return torch.where(cut, 0, -r * t.advantage * t.logp)


@dataclass(frozen=True)
class TOPR(Objective):
    """-sg(w) A log pi, w = 1 where the reward is positive, else clip(r, 0, most), r the ratio of the token.

    Source: after Le Roux et al. 2025 (arXiv:2503.14286), whose eq. 8 takes the ratio of the whole answer; of the token
    in ROLL and Trinity-RFT.

    Args:
        most: the largest ratio of samples without a reward, >= 0.
    """

    most: NonNegative = 1.0

    def __call__(self, t: Tokens) -> Tensor:
        truncated = ratio(t.logp - t.old_logp).clamp(max=self.most).detach()
        return -torch.where(t.reward > 0, 1.0, truncated) * t.advantage * t.logp


@dataclass(frozen=True)
class ShapedLikelihood(Objective):
    """-A p / (p + gamma), p = pi(o_t): learning from another policy's answers without its probabilities.

    The gradient is largest for tokens of small probability.

    Source: Yan et al. 2025 (LUFFY, arXiv:2504.14945); Trinity-RFT.

    Args:
        gamma: > 0.
    """

    gamma: Positive = 0.1

    def __call__(self, t: Tokens) -> Tensor:
        p = torch.exp(t.logp)
        return -t.advantage * (p / (p + self.gamma))


@dataclass(frozen=True)
class ImportanceWeighted(Objective):
    """r f, with a gradient through the ratio r = pi / pi_behaviour, too.

    With f an estimate of a divergence, r f has the divergence's gradient on samples of the other policy (DeepSeek-V3.2;
    TRL ``use_bias_correction_kl``, slime, Liger). ``against="logp"`` is on policy: r = 1, and the gradient
    through it is that of the score function (NeMo RL).

    Args:
        objective: f, of token scope.
        against: the field with the log-probabilities of the policy that sampled.
    """

    objective: Objective
    against: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return ratio(t.logp - getattr(t, self.against).detach()) * self.objective(t)
