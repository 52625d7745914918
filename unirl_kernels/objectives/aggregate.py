"""How the losses of tokens become one number: a weight per token, known from the batch alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.objectives.arguments import check_number


class Aggregation(Protocol):
    """L = sum over units of w * loss, the units being tokens or pairs of sequences."""

    def weights(self, batch: Batch) -> Tensor:
        """Weight of each token (target's shape), or of each pair ([S/2]); float64."""
        ...


@dataclass(frozen=True)
class SequenceMean:
    """Mean over sequences of the mean over tokens, w = 1 / (S |o|).

    Source: Shao et al. 2024 (arXiv:2402.03300v3), eq. 3. Every sequence counts in S; one without tokens adds 0.
    """

    def weights(self, batch: Batch) -> Tensor:
        return batch.valid / batch.per_token(batch.n_sequences * batch.lengths.clamp(min=1).double())


@dataclass(frozen=True, eq=False)
class TokenMean:
    """Mean over all tokens, w = 1 / count.

    Source: Yu et al. 2025 (DAPO, arXiv:2503.14476), eq. 8.

    Args:
        count: tokens of the whole step, > 0 (under gradient accumulation or data parallelism more than this
            batch holds), a number or a 0-dim tensor; None counts the batch's own.

    Raises:
        TypeError: when ``count`` is not a number.
        ValueError: when ``count`` is not positive, or a tensor with dimensions or with a gradient.
    """

    count: float | Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.count, Tensor):
            if self.count.dim():
                raise ValueError(f"count must be a 0-dim tensor, got shape {tuple(self.count.shape)}")
            if self.count.requires_grad:
                raise ValueError("count must not require a gradient: weights are constants of the loss; detach it")
        elif self.count is not None:
            check_number("count", self.count)
            if not self.count > 0:
                raise ValueError(f"count must be positive, got {self.count}")

    def weights(self, batch: Batch) -> Tensor:
        count = batch.valid.sum().clamp(min=1) if self.count is None else self.count
        return (batch.valid.double() / count).masked_fill(~batch.valid, 0)  # 0 / 0 where nothing counts


@dataclass(frozen=True)
class FixedLength:
    """Sum over tokens over a constant length, mean over sequences, w = 1 / (S n).

    Source: Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783), section 3.2.

    Args:
        n: the length, tokens, > 0 (usually the longest completion allowed).

    Raises:
        TypeError: when ``n`` is not a number.
        ValueError: when ``n`` is not positive.
    """

    n: int

    def __post_init__(self) -> None:
        check_number("n", self.n)
        if not self.n > 0:
            raise ValueError(f"n must be positive, got {self.n}")

    def weights(self, batch: Batch) -> Tensor:
        return batch.valid.double() / (batch.n_sequences * self.n)


@dataclass(frozen=True)
class PairMean:
    """Mean over pairs of sequences, w = 2 / S; for objectives of pair scope (DPO)."""

    def weights(self, batch: Batch) -> Tensor:
        pairs = batch.n_sequences // 2
        return torch.full((pairs,), 1 / max(pairs, 1), dtype=torch.float64, device=batch.target.device)
