"""Computes a trainer's loss and gradient at the point where its model calls the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unirl_kernels.api import LossOutput, TokenObservations, fused_linear_loss
from unirl_kernels.api.linear import observed_linear_loss
from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss


class OnePass:
    """The loss of a micro-batch, which the next call of a head computes.

    Args:
        loss: the loss.
        batch_of: makes the batch from the targets of the head's call.
    """

    def __init__(self, loss: Loss, batch_of: Callable[[Tensor], Batch]) -> None:
        self._loss, self._batch_of = loss, batch_of
        self._out: LossOutput | None = None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside this context the next call of a head computes the loss.

        Raises:
            RuntimeError: at the end, when no head was called.
        """
        token = _awaited.set(self)
        try:
            yield
        finally:
            _awaited.reset(token)
        if self._out is None:
            raise RuntimeError(
                "the model did not call the head that makes the loss: unpatch() was called, or the model runs its "
                "forward elsewhere (torch.compile, DataParallel)"
            )

    def run(self, hidden: Tensor, weight: Tensor, targets: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss.

        Args:
            hidden: [N, D].
            weight: [V, D].
            targets: [N] int64.
            how: ``bias``, ``readout`` and ``plan`` of ``fused_linear_loss``.

        Returns:
            log-probabilities and entropies, [N]. A gradient of the log-probabilities is dropped. They are connected to
            the loss in the graph, so that DistributedDataParallel, which starts from a model's outputs, finds all used
            parameters.

        Raises:
            RuntimeError: when the loss was already computed.
        """
        self._check_first()
        self._out = fused_linear_loss(hidden, weight, self._batch_of(targets), self._loss, **how)
        return _Hanging.apply(self._out.logp, self._out.loss), self._out.entropy

    def observe(self, hidden: Tensor, weight: Tensor, targets: Tensor, **how: Any) -> TokenObservations:
        """``run``, with observations of each token's distribution."""
        self._check_first()
        self._out, seen = observed_linear_loss(hidden, weight, self._batch_of(targets), self._loss, **how)
        return seen._replace(logp=_Hanging.apply(seen.logp, self._out.loss))

    def _check_first(self) -> None:
        if self._out is not None:
            raise RuntimeError("the model called its head a second time for the same loss")

    @property
    def loss(self) -> Tensor:
        """0-dim, differentiable."""
        assert self._out is not None
        return self._out.loss


_awaited: ContextVar[OnePass | None] = ContextVar("awaited", default=None)


def awaited() -> OnePass | None:
    """The loss that the next call of a head has to compute; None if only statistics are wanted."""
    return _awaited.get()


class ScoredTokens:
    """The tokens that a trainer scores, packed in the order in which its head gets them.

    Args:
        mask: [S, L], 0 where a token is not scored.
    """

    def __init__(self, mask: Tensor) -> None:
        scored = mask != 0
        self._at = scored.reshape(-1).nonzero().squeeze(-1)  # once, since this waits for an accelerator
        self.lengths = scored.sum(1, dtype=torch.int32)

    @property
    def ends(self) -> Tensor:
        """[S + 1] int32."""
        return pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def packed(self, x: Tensor) -> Tensor:
        """The scored tokens, [N], of [S, L]."""
        return x.reshape(-1)[self._at]

    def at_first(self, x: Tensor) -> Tensor:
        """[N]: a value per sequence, [S], at the sequence's first token, and 0 at its others: their sum is the
        value."""
        n = len(self._at)
        at = self.ends[:-1].clamp(max=n - 1)
        return x.new_zeros(n).index_add(0, at, torch.where(self.lengths > 0, x, 0)) if n else x.new_zeros(0)


class _Hanging(torch.autograd.Function):
    """Values that depend on a loss only in the graph: their gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, d_values: Tensor) -> tuple[None, None]:
        return None, None


class _Reached(torch.autograd.Function):
    """A value with a gradient of 0 for tensors that it does not depend on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(others)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor, Tensor]:
        return d_value, torch.zeros_like(ctx.saved_tensors[0])


def reached_by(value: Tensor, others: Tensor) -> Tensor:
    """A value whose backward also passes other tensors, so that their hooks run."""
    return _Reached.apply(value, others) if others.requires_grad else value  # type: ignore[no-any-return]
