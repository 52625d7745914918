"""Importance ratios, bounded so that none overflows."""

from __future__ import annotations

import torch
from torch import Tensor

BOUND = 40
"""The bound of |log ratio|. exp(40) = 2.4e17: a ratio, the product of two ratios and a square are finite in fp32, so
that an advantage of 0 gives a loss and a gradient of exactly 0. Inside the bound nothing changes. Beyond it the ratio
is constant and has no gradient."""


def ratio(log_ratio: Tensor, bound: float = BOUND) -> Tensor:
    """exp(log_ratio), the log-ratio bounded to [-bound, bound]."""
    return torch.exp(log_ratio.clamp(-bound, bound))


def k3(difference: Tensor) -> Tensor:
    """exp(d) - d - 1, with d bounded from above by ``BOUND``: below 0 nothing overflows."""
    difference = difference.clamp(max=BOUND)
    return torch.expm1(difference) - difference


def clipped(r: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A)."""
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


def clip_metrics(r: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Whether the clip removes the gradient: below, above, or either; one value per ratio."""
    below = (r < 1 - low) & (advantage < 0)
    above = (r > 1 + high) & (advantage > 0)
    named = {"clip_fraction": below | above, "clip_fraction/low": below, "clip_fraction/high": above}
    return {name: x.to(r.dtype) for name, x in named.items()}
