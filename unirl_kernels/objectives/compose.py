"""Objectives made of objectives: scaled by a weight, with another advantage, chosen by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Field, Number, Parameters
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.scopes import SCOPES, scope_of
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["Choose", "EntropyAbove", "Flag", "Scaled", "WithAdvantage"]


Rule = Callable[[Any], Any]
"""A function of tokens, like an objective; its ``scope`` says which tokens it depends on."""


def metrics_of(objective: Any, t: Any) -> Metrics:
    """The metrics of an objective; none if it has no method ``metrics``."""
    return objective.metrics(t) if hasattr(objective, "metrics") else {}


class Composite(Objective):
    """Base of objectives with parts: its scope is the widest of theirs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        object.__setattr__(self, "scope", max(map(scope_of, parts), key=SCOPES.index))


@dataclass(frozen=True)
class Scaled(Composite):
    """w f: an objective times a weight that has no gradient.

    Args:
        objective: f.
        by: w, a rule such as ``TruncatedRatio()`` or ``TrustTV()``: one value per token, or per pair if f has one per
            pair.
    """

    objective: Objective
    by: Rule

    def __call__(self, t: Tokens) -> Tensor:
        with torch.no_grad():
            weight = self.by(t)
        return weight * self.objective(t)

    def metrics(self, t: Tokens) -> Metrics:
        """Those of the objective; ``weight``; ``masked_fraction``: whether the weight is 0."""
        weight = self.by(t).to(t.logp.dtype)
        masked = (weight == 0).to(weight.dtype)
        return {**metrics_of(self.objective, t), "weight": weight, "masked_fraction": masked}


@dataclass(frozen=True)
class WithAdvantage(Composite):
    """An objective with another advantage instead of ``t.advantage``.

    Args:
        objective: the objective.
        advantage: a rule such as ``TeacherAdvantage()``: the advantage of each token, taken without a gradient.
    """

    objective: Objective
    advantage: Rule

    def __call__(self, t: Tokens) -> Tensor:
        return self.objective(self._replaced(t))

    def _replaced(self, t: Tokens) -> Any:
        with torch.no_grad():
            return _Replaced(t, self.advantage(t))

    def metrics(self, t: Tokens) -> Metrics:
        """Those of the objective, and ``advantage``."""
        replaced = self._replaced(t)
        return {**metrics_of(self.objective, replaced), "advantage": replaced.advantage}


class _Replaced:
    """Tokens with another advantage."""

    def __init__(self, tokens: Any, advantage: Any) -> None:
        self._tokens = tokens
        self.advantage = advantage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)


@dataclass(frozen=True)
class Choose(Composite):
    """One objective for tokens where a condition holds, another for the others.

    ``Choose(EntropyAbove(1.0), PolicyGradient(Clip(0.5, 0.5), None), PolicyGradient(Clip(), KL(0.001)))`` is Archer's
    (Wang et al. 2025, arXiv:2507.15778); ``Choose(Flag("expert"), ShapedLikelihood(), Clip())`` is LUFFY's.

    Args:
        condition: a rule that gives a truth value for each token.
        then, otherwise: the objectives.
    """

    condition: Rule
    then: Objective
    otherwise: Objective

    def __call__(self, t: Tokens) -> Tensor:
        return torch.where(self.condition(t), self.then(t), self.otherwise(t))


@dataclass(frozen=True)
class Flag(Parameters):
    """True where a field is not 0.

    Args:
        field: its name.
    """

    field: Field

    def __call__(self, t: Tokens) -> Tensor:
        return getattr(t, self.field) != 0


@dataclass(frozen=True)
class EntropyAbove(Parameters):
    """H > threshold: the minority of tokens where a sequence branches.  Wang et al. 2025 (80/20, arXiv:2506.01939).

    Args:
        threshold: nats.
    """

    threshold: Number

    def __call__(self, t: Tokens) -> Tensor:
        return t.entropy.detach() > self.threshold
