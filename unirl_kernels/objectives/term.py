"""One term of a loss: an objective, the weights of its values, and a coefficient."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.objectives.aggregate import Aggregation, FixedLength, GroupMean, PairMean, SequenceMean, TokenMean
from unirl_kernels.objectives.scopes import scope_of
from unirl_kernels.objectives.tokens import Tokens
from unirl_kernels.program.trace import name_of

OF_TOKENS = (SequenceMean, TokenMean, FixedLength, GroupMean)
"""Aggregations that weigh tokens, not pairs."""


@dataclass(frozen=True)
class Term:
    """One objective of a loss: coefficient * aggregation(objective).

    Args:
        objective: the objective.
        aggregation: the weights of its values.
        coefficient: a number or a 0-dim tensor.
    """

    objective: Callable[[Any], Tensor]
    aggregation: Aggregation
    coefficient: float | Tensor = 1.0

    @property
    def scope(self) -> str:
        return scope_of(self.objective)

    def weights(self, batch: Batch) -> Tensor:
        """Weight of each token (target's shape, 0 at ignored ones) or pair ([S/2]), the coefficient included; float64.

        Raises:
            ValueError: when the aggregation gives weights of a wrong shape or with a gradient, or when the objective
                has batch scope and the sequences of the batch are split.
        """
        if batch.ranks is not None and self.scope == "batch":
            raise ValueError(
                f"objective {name_of(self.objective)} of scope 'batch' must see all tokens, got a batch whose "
                "sequences are split over a sequence_group"
            )
        weights = self.aggregation.weights(batch)
        of_tokens = isinstance(weights, Tensor) and weights.shape == batch.target.shape
        unit, shape = "token", tuple(batch.target.shape)
        if self.scope == "pair" or (self.scope == "batch" and not of_tokens):
            unit, shape = "pair", (batch.n_pairs,)
        if not isinstance(weights, Tensor) or tuple(weights.shape) != shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            hint = "; batch.per_token spreads one per sequence" if got == (batch.n_sequences,) else ""
            raise ValueError(
                f"aggregation {self.aggregation} must give a weight for each {unit}, {shape}, got {got}{hint}"
            )
        if weights.requires_grad:
            raise ValueError(f"aggregation {self.aggregation} must give weights without a gradient: detach them")
        weights = weights.double()
        if unit == "pair" and batch.ranks is not None:
            weights = weights / batch.ranks.size  # each rank has the loss of every pair
        if unit == "token" and not isinstance(self.aggregation, OF_TOKENS):
            weights = weights.masked_fill(~batch.valid, 0)
        if isinstance(self.coefficient, Tensor):
            return torch.where(weights == 0, 0, weights * self.coefficient)  # 0 * inf would not be 0
        return weights if self.coefficient == 1 else weights * self.coefficient

    def composed(self, tokens: Tokens, weights: Tensor, constant: bool) -> Tensor:
        """The term as plain PyTorch, 0-dim: the sum of the objective's values times their weights.

        Args:
            tokens: statistics of each position, and the batch's fields.
            weights: of each token or pair, in any shape.
            constant: whether a single returned value holds for all tokens, as it does for an objective that was traced.

        Raises:
            TypeError: when the objective returns neither a tensor nor a number.
            ValueError: when it does not return one value per token or pair.
        """
        weights = weights.reshape(-1).to(tokens.logp.dtype)
        values = self.objective(tokens)
        if isinstance(values, numbers.Real):
            values = torch.full_like(weights, float(values))
        if not isinstance(values, Tensor):
            raise TypeError(f"objective must return a tensor of losses, got {type(values).__name__}")
        if constant and values.numel() == 1:
            values = values.reshape(()).expand_as(weights)
        if values.shape != weights.shape:
            of_pairs = self.scope == "pair" or (self.scope == "batch" and len(weights) != len(tokens.logp))
            unit = "pair" if of_pairs else "token"
            of_sequences = unit == "token" and tuple(values.shape) == (tokens.n_sequences,)
            hint = "; t.to_tokens spreads one per sequence" if of_sequences else ""
            got = f"{tuple(values.shape)}{hint}"
            raise ValueError(f"objective must return one loss per {unit}, {len(weights)}, got {got}")
        # 0 * inf would not be 0, nor would the gradient of an inf that is multiplied by 0.
        used = weights != 0
        values = torch.where(used, values.to(weights.dtype), 0)
        return (values * weights).sum()


def written(term: Term) -> str:
    """The term as a loss shows it."""
    loss = f"Loss(objective={term.objective!r}, aggregation={term.aggregation!r})"
    coefficient = term.coefficient
    if isinstance(coefficient, Tensor):
        return f"<tensor> * {loss}"
    return loss if coefficient == 1 else f"{coefficient:g} * {loss}"


def check_aggregation(aggregation: object, scope: str) -> None:
    """Raise a ``TypeError`` or ``ValueError`` unless it gives weights to objectives of this scope."""
    if isinstance(aggregation, type) or not callable(getattr(aggregation, "weights", None)):
        raise TypeError(
            f"aggregation must have a method weights(batch), as SequenceMean() and TokenMean() do, got {aggregation!r}"
        )
    wrong = {"pair": OF_TOKENS, "batch": ()}.get(scope, (PairMean,))
    if isinstance(aggregation, wrong):
        raise ValueError(f"aggregation of a {scope}-scope objective cannot be {aggregation}")
