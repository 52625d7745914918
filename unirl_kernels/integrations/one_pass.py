"""Loss and gradient made where a trainer's model calls its head, instead of log-probabilities alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.api import LossOutput, fused_linear_loss
from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss


class OnePass:
    """The loss of a micro-batch, for the next call of a head to make.

    Args:
        loss: the loss.
        batch_of: makes the batch of the targets that the head is called with.
    """

    def __init__(self, loss: Loss, batch_of: Callable[[Tensor], Batch]) -> None:
        self._loss, self._batch_of = loss, batch_of
        self._out: LossOutput | None = None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """The next call of a head inside makes the loss.

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
        """Make the loss.

        Args:
            hidden: [N, D].
            weight: [V, D].
            targets: [N] int64.
            how: ``bias``, ``readout`` and ``plan`` of ``fused_linear_loss``.

        Returns:
            log-probabilities and entropies, [N]. A gradient for the log-probabilities is dropped; they hang on the
            loss so that DistributedDataParallel, which looks from a model's outputs, finds all parameters in use.

        Raises:
            RuntimeError: when the loss was made already.
        """
        if self._out is not None:
            raise RuntimeError("the model called its head a second time for the same loss")
        self._out = fused_linear_loss(hidden, weight, self._batch_of(targets), self._loss, **how)
        return _Hanging.apply(self._out.logp, self._out.loss), self._out.entropy

    @property
    def loss(self) -> Tensor:
        """0-dim, differentiable."""
        assert self._out is not None
        return self._out.loss


_awaited: ContextVar[OnePass | None] = ContextVar("awaited", default=None)


def awaited() -> OnePass | None:
    """The loss that the next call of a head has to make; None where only statistics are wanted."""
    return _awaited.get()


class _Hanging(torch.autograd.Function):
    """Values that depend on a loss in the graph alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, loss: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, d_values: Tensor) -> tuple[None, None]:
        return None, None
