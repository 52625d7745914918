"""What the losses of trainers need besides published objectives: logs under their names, weights by their rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Objective
from unirl_kernels.objectives.arguments import Field, Parameters
from unirl_kernels.objectives.compose import Composite, Rule
from unirl_kernels.objectives.loss import Metrics

Log = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Logged(Composite):
    """An objective that logs what a trainer logs.

    Args:
        objective: the objective.
        log: gives the metrics, by the trainer's names; in place of the objective's own.
    """

    objective: Objective
    log: Log

    def __call__(self, t: Any) -> Tensor:
        return self.objective(t)

    def metrics(self, t: Any) -> Metrics:
        """Those of ``log``."""
        return self.log(t)


class Overlaid:
    """Tokens with some fields in place of others.

    Args:
        tokens: the tokens.
        fields: [T] each.
    """

    def __init__(self, tokens: Any, **fields: Any) -> None:
        self._tokens = tokens
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokens, name)


@dataclass(frozen=True)
class Scored(Composite):
    """A rule or objective that reads another field where ``rollout_logp`` is NaN: at tokens without a rollout's score.

    Args:
        rule: the rule or objective.
        field: the other field; with ``old_logp`` the ratio pi_old / pi_rollout is 1 there.
    """

    rule: Rule
    field: Field = "old_logp"

    def __call__(self, t: Any) -> Any:
        known = torch.where(torch.isnan(t.rollout_logp), getattr(t, self.field).detach(), t.rollout_logp)
        return self.rule(Overlaid(t, rollout_logp=known))


@dataclass(frozen=True)
class WithField(Composite):
    """An objective that reads what a rule gives as a field.

    Args:
        objective: the objective.
        name: of the field.
        rule: gives it, [T]; taken without a gradient.
    """

    objective: Objective
    name: Field
    rule: Rule

    def __call__(self, t: Any) -> Tensor:
        return self.objective(self.with_field(t))

    def with_field(self, t: Any) -> Any:
        """The tokens with the field."""
        with torch.no_grad():
            return Overlaid(t, **{self.name: self.rule(t)})


@dataclass(frozen=True)
class FieldWeight(Parameters):
    """A field, as a weight for ``Scaled``.

    Args:
        field: its name.
    """

    field: Field

    def __call__(self, t: Any) -> Any:
        return getattr(t, self.field)


@dataclass(frozen=True)
class TokensOfStep:
    """Mean over the tokens of a whole step, w = factor / n; n, at least 1, is a field of one value for all.

    Args:
        factor: > 0.
        field: name of the field.
    """

    factor: float = 1.0
    field: str = "num_items_in_batch"

    def weights(self, batch: Batch) -> Tensor:
        count = batch.get(self.field)
        if count.dim():
            raise ValueError(f"{self.field} must have shape (), got {tuple(count.shape)}")
        return batch.valid.double() * self.factor / count.double().clamp(min=1)
