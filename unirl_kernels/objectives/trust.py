"""Masks of trust regions, for ``Scaled``: 1 for tokens that may still change pi, else 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Field, NonNegative, Parameters, Share
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["OneSide", "Ring", "SequenceOneSide", "TrustBand", "TrustKL", "TrustTV"]


@dataclass(frozen=True)
class TrustTV(Parameters):
    """p - q <= high where A > 0, p - q >= -low elsewhere; p, q the probabilities under pi and pi_old.

    ``Scaled(CISPO(0, 20), TrustTV())`` is DPPO as verl trains it, ``Scaled(Ratio(), TrustTV())`` as SkyRL and prime-rl.

    Source: Qi et al. 2026 (DPPO, arXiv:2602.04879), eq. 13.

    Args:
        low, high: in [0, 1].
        against: the field with log q.
    """

    low: Share = 0.2
    high: Share = 0.2
    against: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        moved = torch.exp(t.logp) - torch.exp(getattr(t, self.against))
        return torch.where(t.advantage > 0, moved <= self.high, moved >= -self.low).float()


@dataclass(frozen=True)
class TrustBand(Parameters):
    """|p - q| <= most, whatever the advantage.  prime-rl ``ipo``.

    Args:
        most: in [0, 1].
        against: the field with log q.
    """

    most: Share = 0.1
    against: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        moved = torch.exp(t.logp) - torch.exp(getattr(t, self.against))
        return (torch.abs(moved) <= self.most).float()


@dataclass(frozen=True)
class TrustKL(Parameters):
    """KL between (q, 1 - q) and (p, 1 - p) <= high where A > 0 and p > q, <= low where A <= 0 and p < q.

    Source: Qi et al. 2026 (DPPO, arXiv:2602.04879), eq. 14; 1e-8 is added to 1 - p and 1 - q as in verl.

    Args:
        low, high: nats, >= 0.
        against: the field with log q.
    """

    low: NonNegative = 0.05
    high: NonNegative = 0.05
    against: Field = "old_logp"

    def __call__(self, t: Tokens) -> Tensor:
        other = getattr(t, self.against)
        p, q = torch.exp(t.logp), torch.exp(other)
        kl = q * (other - t.logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
        inside = torch.where(t.advantage > 0, (kl <= self.high) | (p <= q), (kl <= self.low) | (p >= q))
        return inside.float()


@dataclass(frozen=True)
class OneSide(Parameters):
    """r <= 1 + high where A >= 0, r >= 1 - low where A <= 0.  Trinity-RFT REC ``one-side``.

    Source: Yao et al. 2025 (arXiv:2509.24203).

    Args:
        low, high: how far the ratio may fall below and rise above 1.
    """

    low: Share = 0.2
    high: NonNegative = 0.2

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio(t.logp - t.old_logp)
        up, down = (t.advantage >= 0) & (r <= 1 + self.high), (t.advantage <= 0) & (r >= 1 - self.low)
        return (up | down).float()


@dataclass(frozen=True)
class Ring(Parameters):
    """1 - low <= r <= 1 + high; and r <= 1 - far_low where A >= 0, r >= 1 + far_high where A <= 0.

    Trinity-RFT REC ``ring``.  Source: Yao et al. 2025 (arXiv:2509.24203).

    Args:
        low, high: how far the ratio may fall below and rise above 1.
        far_low, far_high: from where on tokens count again that pi moves back.
    """

    low: Share = 0.2
    high: NonNegative = 0.2
    far_low: Share = 0.6
    far_high: NonNegative = 2.0

    def __call__(self, t: Tokens) -> Tensor:
        r = ratio(t.logp - t.old_logp)
        near = (r >= 1 - self.low) & (r <= 1 + self.high)
        up, down = (t.advantage >= 0) & (r <= 1 - self.far_low), (t.advantage <= 0) & (r >= 1 + self.far_high)
        return (near | up | down).float()


@dataclass(frozen=True)
class SequenceOneSide(Parameters):
    """``OneSide`` by the geometric mean of the sequence's ratios.  Trinity-RFT REC ``gspo-one-side``.

    Args:
        low, high: as in ``OneSide``.
    """

    low: Share = 0.2
    high: NonNegative = 0.2

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        s = t.to_tokens(ratio(t.sequence_mean(t.logp - t.old_logp)))
        up, down = (t.advantage >= 0) & (s <= 1 + self.high), (t.advantage <= 0) & (s >= 1 - self.low)
        return (up | down).to(s.dtype)
