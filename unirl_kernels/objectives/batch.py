"""Rules and objectives of the whole batch, which select tokens by their rank. They do not wait for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import NonNegative, Number, Parameters, Share
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.policy import ppo_kl, ratio_to_old
from unirl_kernels.objectives.ratios import clipped
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["ClipCov", "KLCov", "SecondMoment", "TopEntropy", "TopExcess"]


def largest(x: Tensor, valid: Tensor, share: float) -> Tensor:
    """[T] bool: the valid tokens with the largest values, max(1, floor(share * their number)) of them. Of equal values
    the first tokens are taken.

    Args:
        x: [T].
        valid: [T] bool.
        share: in [0, 1].
    """
    order = torch.sort(torch.where(valid, x, -torch.inf), descending=True, stable=True).indices
    n = (valid.sum().double() * share).floor().long().clamp(min=1)
    first = torch.arange(len(x), device=x.device) < n
    return valid & torch.empty_like(valid).scatter(0, order, first)


@dataclass(frozen=True)
class TopEntropy(Parameters):
    """1 for the tokens whose entropy is at least the batch's quantile 1 - share, else 0: a weight for ``Scaled``.

    Source: Wang et al. 2025 (80/20, arXiv:2506.01939); TRL ``top_entropy_quantile``, ms-swift.

    Args:
        share: of the tokens, in [0, 1].
    """

    share: Share = 0.2

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        h = t.entropy.detach()
        threshold = torch.nanquantile(torch.where(t.valid, h, torch.nan), 1 - self.share)
        return (h >= threshold).to(h.dtype)


@dataclass(frozen=True)
class TopExcess(Parameters):
    """1 for the share of tokens with the largest log pi_ref / pi, which the reference knows better than pi; else 0.

    ``1 / share * Loss(Scaled(SFT(), TopExcess(share)), TokenMean())`` is Rho-1's loss.

    Source: Lin et al. 2024 (Rho-1, arXiv:2404.07965).

    Args:
        share: of the tokens, in [0, 1].
    """

    share: Share = 0.5

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        excess = (t.ref_logp - t.logp).detach()
        return largest(excess, t.valid, self.share).to(excess.dtype)


def covariances(t: Tokens) -> Tensor:
    """(A - mean A) (log pi - mean log pi) of each token, without a gradient; the means over the batch's tokens."""
    n = t.valid.sum().clamp(min=1)
    a, logp = t.advantage, t.logp.detach()
    return (a - torch.where(t.valid, a, 0).sum() / n) * (logp - torch.where(t.valid, logp, 0).sum() / n)


@dataclass(frozen=True)
class ClipCov(Objective):
    """PPO's loss, 0 for tokens whose covariance of advantage and log pi lies between two bounds.

    verl and SkyRL leave out a random ``clip_cov_ratio`` of them; here it is all.

    Source: Cui et al. 2025 (arXiv:2505.22617), Clip-Cov.

    Args:
        low, high: as in ``Clip``.
        least, most: bounds of the covariance.
    """

    low: Share = 0.2
    high: NonNegative = 0.2
    least: Number = 1.0
    most: Number = 5.0

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        loss = clipped(ratio_to_old(t), t.advantage, self.low, self.high)
        return torch.where(self._left_out(t), 0, loss)

    def _left_out(self, t: Tokens) -> Tensor:
        cov, r = covariances(t), ratio_to_old(t)
        cut = r.clamp(1 - self.low, 1 + self.high) * t.advantage < r * t.advantage
        return (cov > self.least) & (cov < self.most) & ~cut

    def metrics(self, t: Tokens) -> Metrics:
        """``clip_fraction``: tokens that are left out; ``ppo_kl``."""
        return {"clip_fraction": self._left_out(t).to(t.logp.dtype)} | ppo_kl(t)


@dataclass(frozen=True)
class KLCov(Objective):
    """-r A, and coefficient |log r| for the share of tokens with the largest covariance of advantage and log pi.

    Of tokens with equal covariances the first are taken, so that the share is exact.

    Source: Cui et al. 2025 (arXiv:2505.22617), KL-Cov; verl, SkyRL.

    Args:
        share: of the tokens, in [0, 1]; at least one.
        coefficient: >= 0.
    """

    share: Share = 2e-4
    coefficient: NonNegative = 1.0

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        penalty = self.coefficient * torch.abs(t.logp - t.old_logp)
        chosen = largest(covariances(t), t.valid, self.share)
        return -ratio_to_old(t) * t.advantage + torch.where(chosen, penalty, 0)

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``: |log r|, as verl logs it here."""
        return {"ppo_kl": torch.abs(t.logp - t.old_logp)}


@dataclass(frozen=True)
class SecondMoment(Parameters):
    """M2PO: 0 for the tokens with the largest (log r)^2, as few as leave a mean of at most ``most``; else 1.

    Only tokens that PPO could clip are counted and left out: A > 0 and r > 1, or A < 0 and r < 1.

    Source: Zheng et al. 2025 (arXiv:2510.01161), Algorithm 1; Trinity-RFT.

    Args:
        most: of the mean of (log r)^2, >= 0.
    """

    most: NonNegative = 0.04

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        log_ratio = (t.logp - t.old_logp).detach()
        counted = t.valid & (t.advantage * log_ratio > 0)
        moments = torch.where(counted, torch.square(log_ratio), torch.inf)
        ordered, order = torch.sort(moments, stable=True)
        means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
        kept = torch.empty_like(counted).scatter(0, order, means <= self.most)
        return (kept | ~counted).to(log_ratio.dtype)
