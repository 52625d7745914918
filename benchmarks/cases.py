"""A provider at work: its function bound to operands, run forward, backward or both as the mode asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.buffers import Ring
from benchmarks.inputs import Inputs, Values
from benchmarks.providers import Function
from benchmarks.work import FORWARD_BACKWARD, FUSED, STATS, STATS_BACKWARD

Operands = Sequence[Tensor]


class Outcome(NamedTuple):
    values: Values
    gradients: tuple[Tensor, ...]  # of the operands; empty where none are asked for


class Case:
    """Calls that do the same work again and again, each on operands that no cache holds.

    Args:
        function: of a provider.
        inputs: the work.
        rings: where each operand is taken from.
        overwrites: the function writes into the operands.
    """

    def __init__(self, function: Function, inputs: Inputs, rings: Sequence[Ring], overwrites: bool) -> None:
        self._function, self._inputs, self._rings, self._overwrites = function, inputs, rings, overwrites
        self._prepare()

    def __call__(self) -> Outcome:
        """Do the work once."""
        return self._run()

    def renew(self) -> None:
        """Prepare the next call; this is not timed."""
        if self._overwrites:
            self._restore()
        self._prepare()

    def operands_are_intact(self) -> bool:
        """Whether the last call left the operands unchanged. Changed operands are restored."""
        intact = all(map(torch.equal, self._operands, self._inputs.operands))
        if not intact:
            self._restore()
        return intact

    def _restore(self) -> None:
        for ring, copy in zip(self._rings, self._operands, strict=True):
            ring.restore(copy)

    def _prepare(self) -> None:
        self._operands = [ring.take() for ring in self._rings]
        self._run = _RUNS[self._inputs.work.mode](self._function, self._inputs, self._operands)


def _leaves(operands: Operands) -> tuple[list[Tensor], list[Tensor]]:
    """The operands as leaves, and as results of a computation, which may be overwritten as those of a model may."""
    leaves = [x.detach().requires_grad_() for x in operands]
    return leaves, [_Computed.apply(x) for x in leaves]


class _Computed(torch.autograd.Function):
    """The identity. Its result shares memory with x but is no view: it may be overwritten although x is a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Tensor:
        return d_x


def _loss_and_gradient(function: Function, inputs: Inputs, operands: Operands) -> Callable[[], Outcome]:
    def run() -> Outcome:
        leaves, computed = _leaves(operands)
        values = function(*computed)
        assert values.loss is not None
        return Outcome(values, torch.autograd.grad(values.loss, leaves))

    return run


def _statistics(function: Function, inputs: Inputs, operands: Operands) -> Callable[[], Outcome]:
    def run() -> Outcome:
        with torch.no_grad():
            return Outcome(function(*operands), ())

    return run


def _forward_backward(function: Function, inputs: Inputs, operands: Operands) -> Callable[[], Outcome]:
    return lambda: _backward(function, inputs, operands)()


def _backward(function: Function, inputs: Inputs, operands: Operands) -> Callable[[], Outcome]:
    leaves, computed = _leaves(operands)
    values = function(*computed)
    upstream = [(x, d) for x, d in ((values.logp, inputs.d_logp), (values.entropy, inputs.d_entropy)) if x is not None]

    def run() -> Outcome:
        outputs = [x for x, _ in upstream]
        return Outcome(values, torch.autograd.grad(outputs, leaves, [d.to(x.dtype) for x, d in upstream]))

    return run


_RUNS = {
    FUSED: _loss_and_gradient,
    STATS: _statistics,
    STATS_BACKWARD: _backward,
    FORWARD_BACKWARD: _forward_backward,
}
