"""Aggregations: the weights with which the losses of tokens or pairs are summed. They depend only on the batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.objectives.arguments import check_count, check_number

Empty = Literal["count", "skip"]


class Aggregation(Protocol):
    """L = sum over units of w * loss, where units are tokens or pairs of sequences.

    A token of weight 0 adds exactly 0 to loss and gradient, even if its loss is NaN or inf.
    """

    def weights(self, batch: Batch) -> Tensor:
        """Weight of each token (target's shape, 0 at ignored ones), or of each pair ([S/2]); float64, no gradient."""
        ...


def _equal(x: object, default: object) -> bool:
    return x is default or (not isinstance(x, Tensor) and x == default)


class _Value:
    """A base whose repr is the constructor call, without arguments that have their default."""

    def __repr__(self) -> str:
        given = [f for f in fields(self) if not _equal(getattr(self, f.name), f.default)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


def _sequences(batch: Batch, count: float | Tensor | None, empty: Empty) -> float | Tensor:
    """The number of sequences in a mean over sequences; a tensor is 0-dim."""
    if count is not None:
        return count
    return batch.n_sequences if empty == "count" else (batch.lengths > 0).sum().clamp(min=1).double()


def _check_empty(empty: str) -> None:
    if empty not in ("count", "skip"):
        raise ValueError(f"empty must be 'count' or 'skip', got {empty!r}")


def _over(numerator: Tensor, count: float | Tensor, batch: Batch) -> Tensor:
    """A quotient, 0 at ignored tokens: a count in a tensor may be 0, and 0 / 0 is NaN."""
    quotient = numerator / count
    return quotient.masked_fill(~batch.valid, 0) if isinstance(count, Tensor) else quotient


@dataclass(frozen=True, repr=False)
class SequenceMean(_Value):
    """Mean over sequences of the mean over tokens, w = 1 / (S |o|).

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 3.

    Args:
        count: S, the number of sequences of the whole step, > 0, a number or a 0-dim tensor. Give it under gradient
            accumulation or data parallelism, where this batch holds only a part of them. None: the sequences of this
            batch.
        empty: without ``count``: whether a sequence without valid tokens counts in S. ``"count"``: yes, as in TRL.
            ``"skip"``: no, as in verl. Its loss is 0 in both cases.

    Raises:
        TypeError: when ``count`` is not a number.
        ValueError: when ``count`` is not positive, has dimensions or a gradient, or ``empty`` has another value.

    Examples:
        >>> batch = uk.Batch(torch.tensor([[5, 7], [8, uk.IGNORE]]))  # lengths 2 and 1
        >>> uk.SequenceMean().weights(batch)
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]], dtype=torch.float64)
    """

    count: float | Tensor | None = None
    empty: Empty = "count"

    def __post_init__(self) -> None:
        check_count("count", self.count)
        _check_empty(self.empty)

    def weights(self, batch: Batch) -> Tensor:
        lengths = batch.per_token(batch.lengths.clamp(min=1).double())
        return _over(batch.valid / lengths, _sequences(batch, self.count, self.empty), batch)


@dataclass(frozen=True, repr=False)
class TokenMean(_Value):
    """Mean over all tokens, w = 1 / count.

    Source: Yu et al. 2025 (DAPO, arXiv:2503.14476), eq. 8.

    Args:
        count: the number of tokens of the whole step, > 0, a number or a 0-dim tensor. Give it under gradient
            accumulation or data parallelism, where this batch holds only a part of them. None: the tokens of this
            batch. 1: the loss is the sum.

    Raises:
        TypeError: when ``count`` is not a number.
        ValueError: when ``count`` is not positive, or a tensor with dimensions or with a gradient.

    Examples:
        >>> batch = uk.Batch(torch.tensor([[5, 7], [8, uk.IGNORE]]))
        >>> uk.TokenMean(count=10).weights(batch)
        tensor([[0.1000, 0.1000],
                [0.1000, 0.0000]], dtype=torch.float64)
    """

    count: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count)

    def weights(self, batch: Batch) -> Tensor:
        count = batch.n_tokens.clamp(min=1) if self.count is None else self.count
        return _over(batch.valid.double(), count, batch)


@dataclass(frozen=True, repr=False)
class FixedLength(_Value):
    """Mean over sequences of the sum over tokens, divided by a constant length n, w = 1 / (S n).

    Source: Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783), section 3.2.

    Args:
        n: the length, tokens, > 0 (usually the longest completion allowed); 1 for the sum over tokens.
        count: S, as in ``SequenceMean``.
        empty: as in ``SequenceMean``.

    Raises:
        TypeError: when ``n`` or ``count`` is not a number.
        ValueError: when ``n`` or ``count`` is not positive, or ``empty`` has another value.

    Examples:
        >>> batch = uk.Batch(torch.tensor([[5, 7], [8, uk.IGNORE]]))
        >>> uk.FixedLength(4).weights(batch)
        tensor([[0.1250, 0.1250],
                [0.1250, 0.0000]], dtype=torch.float64)
    """

    n: float
    count: float | Tensor | None = None
    empty: Empty = "count"

    def __post_init__(self) -> None:
        check_number("n", self.n)
        if not self.n > 0:
            raise ValueError(f"n must be positive, got {self.n}")
        check_count("count", self.count)
        _check_empty(self.empty)

    def weights(self, batch: Batch) -> Tensor:
        return _over(batch.valid.double() / self.n, _sequences(batch, self.count, self.empty), batch)


@dataclass(frozen=True, repr=False)
class GroupMean(_Value):
    """Mean over groups of the mean over all tokens of a group, w = 1 / (G tokens of the group).

    A group holds the samples of one question (SkyRL's prompt mean, slime's rollout mean).

    Args:
        field: name of the field that holds each sequence's group, [S] integer.
        count: G, the number of groups of the whole step, > 0. None: the groups of this batch that have valid tokens.

    Raises:
        TypeError: when ``count`` is not a number.
        ValueError: when ``count`` is not positive.

    Examples:
        >>> target = torch.tensor([[5, 7], [8, uk.IGNORE], [6, 4]])
        >>> batch = uk.Batch(target, fields={"group": torch.tensor([0, 0, 1])})  # 3 tokens, then 2
        >>> uk.GroupMean().weights(batch)
        tensor([[0.1667, 0.1667],
                [0.1667, 0.0000],
                [0.2500, 0.2500]], dtype=torch.float64)
    """

    field: str = "group"
    count: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count)

    def weights(self, batch: Batch) -> Tensor:
        group = batch.per_sequence_field(self.field)
        lengths = batch.lengths
        same = group.unsqueeze(0) == group.unsqueeze(1)
        tokens = (same * lengths).sum(-1)
        # Counts each group once: each of its sequences with tokens adds 1 / (number of such sequences).
        members = (same & (lengths > 0)).sum(-1).clamp(min=1)
        own = ((lengths > 0).double() / members).sum().clamp(min=1)
        count = own if self.count is None else self.count
        return _over(batch.valid / batch.per_token(tokens.clamp(min=1).double()), count, batch)


@dataclass(frozen=True, repr=False)
class PairMean(_Value):
    """Mean over pairs of sequences, w = 1 / P; for objectives of pair scope (DPO).

    Args:
        count: P, the number of pairs of the whole step, > 0. None: the pairs of this batch, S / 2.

    Raises:
        TypeError: when ``count`` is not a number.
        ValueError: when ``count`` is not positive.

    Examples:
        >>> uk.PairMean().weights(uk.Batch(torch.tensor([[5], [8], [6], [4]])))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    count: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_count("count", self.count)

    def weights(self, batch: Batch) -> Tensor:
        pairs = batch.n_sequences // 2
        count = max(pairs, 1) if self.count is None else self.count
        return torch.ones(pairs, dtype=torch.float64, device=batch.target.device) / count


@dataclass(frozen=True, repr=False)
class Weighted(_Value):
    """The weights of another aggregation times a field: sample weights, loss scales, masks that keep the denominator.

    A token whose field is 0 is left out of the sum, but still counts in the denominator of ``base``.

    Args:
        base: the aggregation.
        field: name of the field, of shape [], [S] or target's. For pairs it has one value per sequence, and the weight
            of a pair is multiplied by the values of both sequences.

    Raises:
        TypeError: when ``base`` has no weights.

    Examples:
        >>> target = torch.tensor([[5, 7], [8, uk.IGNORE]])
        >>> batch = uk.Batch(target, fields={"trust": torch.tensor([1.0, 0.0])})
        >>> uk.Weighted(uk.TokenMean(), "trust").weights(batch)
        tensor([[0.3333, 0.3333],
                [0.0000, 0.0000]], dtype=torch.float64)
    """

    base: Aggregation
    field: str

    def __post_init__(self) -> None:
        if isinstance(self.base, type) or not callable(getattr(self.base, "weights", None)):
            raise TypeError(f"base must have a method weights(batch), as SequenceMean() does, got {self.base!r}")

    def weights(self, batch: Batch) -> Tensor:
        weights = self.base.weights(batch)
        if not _weighs_pairs(self.base, weights, batch):
            return torch.where(weights == 0, 0, weights * batch.per_token_field(self.field).double())
        chosen, rejected = batch.split_pairs(batch.per_sequence_field(self.field).double())
        return weights * chosen * rejected


def _weighs_pairs(aggregation: Aggregation, weights: Tensor, batch: Batch) -> bool:
    """Whether weights are per pair. The shape alone does not tell if a batch has as many pairs as tokens."""
    if isinstance(aggregation, Weighted):
        return _weighs_pairs(aggregation.base, weights, batch)
    return isinstance(aggregation, PairMean) or weights.shape != batch.target.shape
