"""A provider at work: its function bound to logits, run forward, backward or both as the mode asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.bench.buffers import Ring
from unirl_kernels.bench.providers import Function
from unirl_kernels.bench.work import FORWARD_BACKWARD, FUSED, STATS, STATS_BACKWARD, Inputs, Values


class Outcome(NamedTuple):
    values: Values
    gradient: Tensor | None  # [B, L, V]


class Case:
    """Calls that do the same work again and again, each on logits that no cache holds.

    Args:
        function: of a provider.
        inputs: the work.
        ring: where logits are taken from.
        overwrites: the function writes into the logits.
    """

    def __init__(self, function: Function, inputs: Inputs, ring: Ring, overwrites: bool) -> None:
        self._function, self._inputs, self._ring, self._overwrites = function, inputs, ring, overwrites
        self._prepare()

    def __call__(self) -> Outcome:
        """Do the work once."""
        return self._run()

    def renew(self) -> None:
        """Get ready for the next call; not part of the work."""
        if self._overwrites:
            self._ring.restore(self._logits)
        self._prepare()

    def logits_are_intact(self) -> bool:
        """Whether the last call left the logits as they were; put right where it did not."""
        intact = torch.equal(self._logits, self._inputs.logits)
        if not intact:
            self._ring.restore(self._logits)
        return intact

    def _prepare(self) -> None:
        self._logits = self._ring.take()
        self._run = _RUNS[self._inputs.work.mode](self._function, self._inputs, self._logits)


def _leaf(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits as a leaf, and as a model would hand them over: computed, so that they may be overwritten."""
    leaf = logits.detach().requires_grad_()
    return leaf, leaf.view_as(leaf)


def _loss_and_gradient(function: Function, inputs: Inputs, logits: Tensor) -> Callable[[], Outcome]:
    def run() -> Outcome:
        leaf, computed = _leaf(logits)
        values = function(computed)
        assert values.loss is not None
        (gradient,) = torch.autograd.grad(values.loss, leaf)
        return Outcome(values, gradient)

    return run


def _statistics(function: Function, inputs: Inputs, logits: Tensor) -> Callable[[], Outcome]:
    def run() -> Outcome:
        with torch.no_grad():
            return Outcome(function(logits), None)

    return run


def _forward_backward(function: Function, inputs: Inputs, logits: Tensor) -> Callable[[], Outcome]:
    return lambda: _backward(function, inputs, logits)()


def _backward(function: Function, inputs: Inputs, logits: Tensor) -> Callable[[], Outcome]:
    leaf, computed = _leaf(logits)
    values = function(computed)
    upstream = [(x, d) for x, d in ((values.logp, inputs.d_logp), (values.entropy, inputs.d_entropy)) if x is not None]

    def run() -> Outcome:
        outputs = [x for x, _ in upstream]
        (gradient,) = torch.autograd.grad(outputs, leaf, [d.to(x.dtype) for x, d in upstream])
        return Outcome(values, gradient)

    return run


_RUNS = {
    FUSED: _loss_and_gradient,
    STATS: _statistics,
    STATS_BACKWARD: _backward,
    FORWARD_BACKWARD: _forward_backward,
}


def copy_call(ring: Ring) -> Callable[[], object]:
    """``copy_`` of the same tensor: the bandwidth that everything is measured against."""
    return lambda: ring.take().copy_(ring.take())


def sum_call(ring: Ring) -> Callable[[], object]:
    """The sum of the same tensor: one read, the bandwidth for statistics."""
    return lambda: ring.take().sum()
