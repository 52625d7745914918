"""What verl's policy losses log, under its names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.objectives import CISPO, Objective
from unirl_kernels.objectives.arguments import NonNegative, Parameters, Positive
from unirl_kernels.objectives.compose import Rule

ZERO = "zero"
"""In place of the name of a metric: verl logs 0."""

BOUND = 20.0
"""Where verl bounds |log pi / pi_old|."""


@dataclass(frozen=True)
class ActorLog(Parameters):
    """``actor/ppo_kl``, ``actor/pg_clipfrac``, ``actor/pg_clipfrac_lower``.

    Args:
        objective: whose metrics they are.
        clipped, lower: names of the objective's metrics for the latter two; None: not logged.
        bound: of the log-ratio in ``actor/ppo_kl``; None: not bounded.
        kept: rule for the tokens that count, bool; None: all.
    """

    objective: Objective
    clipped: str | None = None
    lower: str | None = None
    bound: Positive | None = None
    kept: Rule | None = None

    def __call__(self, t: Any) -> dict[str, Any]:
        values = self.values(t)
        if self.kept is None:
            return values
        kept = self.kept(t)
        return {name: (x, kept) for name, x in values.items()}

    def values(self, t: Any) -> dict[str, Any]:
        """Of each token."""
        log_ratio = t.logp - t.old_logp
        if self.bound is not None:
            log_ratio = log_ratio.clamp(-self.bound, self.bound)
        own = {ZERO: torch.zeros_like(log_ratio), **self.objective.metrics(t)}
        named = {"actor/pg_clipfrac": self.clipped, "actor/pg_clipfrac_lower": self.lower}
        return {"actor/ppo_kl": -log_ratio, **{name: own[of] for name, of in named.items() if of is not None}}


@dataclass(frozen=True)
class TrustLog(ActorLog):
    """That of DPPO: its lower fraction is of the tokens inside the trust region whose ratio is truncated.

    Args:
        most: the largest ratio.
    """

    most: Positive = 20.0

    def values(self, t: Any) -> dict[str, Any]:
        own: dict[str, Any] = {**self.objective.metrics(t), **CISPO(0.0, self.most).metrics(t)}
        return {**super().values(t), "actor/pg_clipfrac_lower": own["clip_fraction"] * (1 - own["masked_fraction"])}


@dataclass(frozen=True)
class AbsoluteLog(Parameters):
    """``actor/ppo_kl``, |log pi / pi_old|."""

    def __call__(self, t: Any) -> dict[str, Any]:
        return {"actor/ppo_kl": torch.abs(t.logp - t.old_logp)}


@dataclass(frozen=True)
class GeoMeanLog(Parameters):
    """That of ``geo_mean``: log-ratios outside the bounds on either side, with A > 0 and with A < 0.

    Args:
        low, high: as in ``GMPO``.
    """

    low: NonNegative
    high: NonNegative

    def __call__(self, t: Any) -> dict[str, Any]:
        log_ratio = t.logp - t.old_logp
        outside = (log_ratio < -self.low) | (log_ratio > self.high)

        def share(of: Tensor) -> Tensor:
            return (outside & of).to(log_ratio.dtype)

        return {
            "actor/ppo_kl": -log_ratio,
            "actor/pg_clipfrac": share(t.advantage > 0),
            "actor/pg_clipfrac_lower": share(t.advantage < 0),
        }
