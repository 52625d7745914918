"""Surrogates of the return that replace PPO's clip: gates, quadratic penalties, other bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import AboveOne, NonNegative, Positive, Share
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.policy import ppo_kl, ratio_to_old
from unirl_kernels.objectives.ratios import clip_metrics, clipped, ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["ASPO", "DCPO", "DRPO", "SAPO", "SPO", "SimplePPO"]


@dataclass(frozen=True)
class SAPO(Objective):
    """Soft adaptive policy optimisation, -(4 / tau) sigma(tau (r - 1)) A: a gate in place of the clip.

    Source: Gao et al. 2025 (arXiv:2511.20347); TRL, verl, SkyRL, AReaL.

    Args:
        positive, negative: tau where A > 0, and elsewhere; > 0.
    """

    positive: Positive = 1.0
    negative: Positive = 1.05

    def __call__(self, t: Tokens) -> Tensor:
        positive, negative = torch.full_like(t.logp, self.positive), torch.full_like(t.logp, self.negative)
        tau = torch.where(t.advantage > 0, positive, negative)
        return -torch.sigmoid(tau * (ratio_to_old(t) - 1)) * (4 / tau) * t.advantage

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class SPO(Objective):
    """Simple policy optimisation, -r A + |A| (r - 1)^2 / (2 epsilon).  Xie et al. 2024 (arXiv:2401.16025).

    Args:
        epsilon: the ratio's distance from 1 where the gradient is 0, > 0.
    """

    epsilon: Positive = 0.2

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio_to_old(t)
        return -r * t.advantage + torch.abs(t.advantage) * torch.square(r - 1) / (2 * self.epsilon)

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class DRPO(Objective):
    """-r A + |A| pi_old (r - 1)^2 / (2 epsilon): ``SPO`` whose epsilon grows as a token is less probable.

    Source: Tencent-Hunyuan/UniRL ``drpo``; verl's recipe ``spo_adaptive_eps``.

    Args:
        epsilon: > 0.
    """

    epsilon: Positive = 12.5

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio_to_old(t)
        scale = torch.abs(t.advantage) * torch.exp(t.old_logp)
        return -r * t.advantage + scale * torch.square(r - 1) / (2 * self.epsilon)

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class SimplePPO(Objective):
    """-A log r where 1 / (1 + epsilon) <= r <= 1 + epsilon, else 0.  Trinity-RFT ``sppo``.

    Args:
        epsilon: > 0.
    """

    epsilon: Positive = 0.3

    def __call__(self, t: Tokens) -> Tensor:
        log_ratio = t.logp - t.old_logp
        r = ratio(log_ratio).detach()
        inside = (r >= 1 / (1 + self.epsilon)) & (r <= 1 + self.epsilon)
        return torch.where(inside, -t.advantage * log_ratio, 0)

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class ASPO(Objective):
    """``Clip`` where A <= 0; where A > 0, -A / r with the gradient of -A log pi / r, 0 where r > 1 + high.

    So unlikely tokens of good answers are raised more, likely ones less.

    Source: after Wang et al. 2025 (arXiv:2510.06062), who flip the ratio of tokens with a positive advantage and bound
    the flipped one without cutting its gradient. Their dual clip of r where A < 0 is left out.

    Args:
        low, high: as in ``Clip``.
        c: the largest flipped ratio, > 1.
    """

    low: Share = 0.2
    high: NonNegative = 0.2
    c: AboveOne = 3.0

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio_to_old(t)
        flipped = (1 / r).clamp(max=self.c).detach() * torch.exp(t.logp - t.logp.detach())
        raised = torch.where(r > 1 + self.high, 0, -flipped * t.advantage)
        return torch.where(t.advantage > 0, raised, clipped(r, t.advantage, self.low, self.high))

    def metrics(self, t: Tokens) -> Metrics:
        """Those of ``Clip``."""
        return clip_metrics(ratio_to_old(t), t.advantage, self.low, self.high) | ppo_kl(t)


@dataclass(frozen=True)
class DCPO(Objective):
    """``Clip`` with bounds by the old probability q.

        1/2 + sqrt(max(1/4 - low / q, 0)) <= r <= 1/2 + sqrt(1/4 + high / q)

    They are where |(r - 1) r| q reaches low and high, and wide for tokens that were unlikely.

    Source: after Yang et al. 2025 (arXiv:2509.02333), dynamic adaptive clipping; without the dual clip where A < 0 of
    their code.

    Args:
        low, high: >= 0.
        most: the largest ratio that counts, > 1.
    """

    low: NonNegative = 0.16
    high: NonNegative = 0.2
    most: AboveOne = 10.0

    def __call__(self, t: Tokens) -> Tensor:
        r, q = ratio_to_old(t), torch.exp(t.old_logp)
        below = 0.5 + torch.sqrt((0.25 - self.low / q).clamp(min=0))
        above = (0.5 + torch.sqrt(0.25 + self.high / q)).clamp(max=self.most)
        return -torch.minimum(r * t.advantage, torch.minimum(torch.maximum(r, below), above) * t.advantage)

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)
