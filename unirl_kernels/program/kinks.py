"""Derivatives at kinks: where a bound is met, at ties, at 0. PyTorch has changed some of them (clamp in 2.14).

They are asked of the torch that is installed, once, when this module is imported, and not looked up by its version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.program.graph import Graph
from unirl_kernels.program.ir import Op

NUMBERS, TENSORS = "numbers", "tensors"
"""What the bounds of a clamp are: torch has a function for each, and they differ at the bounds."""


def slopes(function: Callable[..., Tensor], *at: float) -> tuple[float, ...]:
    """Derivatives of one torch function with respect to each argument at a point, by autograd.

    Args:
        function: calls a single differentiable torch function on 0-dim float64 tensors.
        at: the point.
    """
    with torch.inference_mode(False), torch.enable_grad():
        value = function(*(torch.tensor(x, dtype=torch.float64, device="cpu", requires_grad=True) for x in at))
    # The node by itself, not backward(): autograd's engine starts threads where there is a GPU, and a process that has
    # them must not fork.
    with torch.inference_mode(False), torch.no_grad():
        node: Any = value.grad_fn
        found = node(torch.ones((), dtype=torch.float64, device="cpu"))
    given = found if isinstance(found, tuple) else (found,)
    return tuple(float(x) for x in given[: len(at)])


@dataclass(frozen=True)
class Kinks:
    """What autograd gives at the kinks.

    Args:
        tie: of minimum and maximum, for both arguments.
        abs: at 0.
        relu: at 0.
        number: of clamp where x is at a bound that is a number.
        tensor: of clamp where x is at a bound that is a tensor: for x, for the bound.
        both: of clamp where x and both bounds are equal: for x, for the lower and for the upper bound.
        below: of clamp where x is below two equal bounds: for x, for the lower and for the upper bound.
    """

    tie: tuple[float, ...]
    abs: float
    relu: float
    number: float
    tensor: tuple[float, ...]
    both: tuple[float, ...]
    below: tuple[float, ...]


def asked() -> Kinks:
    """``Kinks`` of the torch that is installed."""
    return Kinks(
        tie=slopes(torch.maximum, 1, 1),
        abs=slopes(torch.abs, 0)[0],
        relu=slopes(torch.relu, 0)[0],
        number=slopes(lambda x: x.clamp(1.0, 2.0), 1)[0],
        tensor=slopes(torch.clamp, 1, 1, 2)[:2],
        both=slopes(torch.clamp, 1, 1, 1),
        below=slopes(torch.clamp, 0, 1, 1),
    )


KINKS = asked()


def clamp(g: Graph, y: int, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
    """Derivative of clamp: outside, a bound that is a tensor has it, the upper one where it is below the lower one.

    Args:
        g, y, x, dx: as for every rule; ``value`` of the node y says what the bounds are.
    """
    of_numbers = g.nodes[y].value == NUMBERS
    at_bound = _part(g, KINKS.number, dx[0]) if of_numbers else _at_bounds(g, x, dx)
    between, inside, zero = _within(g, x, Op.LT), _within(g, x, Op.LE), g.const(0)
    if all(bound == zero for bound in dx[1:]):
        if at_bound == zero:
            return g.op(Op.WHERE, between, dx[0], zero)
        return g.op(Op.WHERE, inside, g.op(Op.WHERE, between, dx[0], at_bound), zero)
    at_bound = g.op(Op.WHERE, between, dx[0], at_bound)
    equal_bounds = _sum(g, KINKS.below, dx)
    below = dx[1] if _open(g, x[2]) else g.op(Op.WHERE, g.op(Op.LT, x[1], x[2]), dx[1], equal_bounds)
    above = g.op(Op.WHERE, g.op(Op.LT, x[2], x[0]), dx[2], zero)
    outside = g.op(Op.WHERE, g.op(Op.LT, x[0], x[1]), below, above)
    crossed = g.op(Op.LT, x[2], x[1])
    return g.op(Op.WHERE, crossed, dx[2], g.op(Op.WHERE, inside, at_bound, outside))


def _within(g: Graph, x: tuple[int, ...], before: Op) -> int:
    """Node of lower < x < upper, or <=; of one comparison where there is one bound."""
    of_x, low, high = x
    sides = ((low, (low, of_x)), (high, (of_x, high)))
    compared = [g.op(before, *pair) for bound, pair in sides if not _open(g, bound)]
    return compared[0] if len(compared) == 1 else g.op(Op.MUL, *compared)


def _open(g: Graph, bound: int) -> bool:
    """Whether there is no such bound."""
    value = g.constant_value(bound)
    return value is not None and math.isinf(value)


def _at_bounds(g: Graph, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
    """Derivative where x is at one bound or at both, which are tensors."""
    low, high = (g.op(Op.EQ, x[0], bound) for bound in x[1:])
    upper = g.op(Op.WHERE, high, _sum(g, KINKS.tensor, (dx[0], dx[2])), dx[0])
    at_low = g.op(Op.WHERE, high, _sum(g, KINKS.both, dx), _sum(g, KINKS.tensor, dx[:2]))
    if _open(g, x[1]):
        return upper
    if _open(g, x[2]):
        return _sum(g, KINKS.tensor, dx[:2])
    return g.op(Op.WHERE, low, at_low, upper)


def extremum(order: tuple[int, int]) -> Callable[[Graph, int, tuple[int, ...], tuple[int, ...]], int]:
    """Rule of minimum and maximum: the chosen argument's derivative, a share of both at a tie, their sum where an
    argument is NaN."""

    def rule(g: Graph, y: int, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
        if dx[0] == dx[1]:
            return dx[0]
        first, second = (g.op(Op.LE, x[k], x[1 - k]) for k in order)
        if_first = g.op(Op.WHERE, second, _sum(g, KINKS.tie, dx), dx[0])
        return g.op(Op.WHERE, first, if_first, g.op(Op.WHERE, second, dx[1], g.op(Op.ADD, *dx)))

    return rule


def abs_slope(g: Graph, x: int, y: int) -> int:
    """Slope of abs."""
    return g.op(Op.ADD, g.op(Op.SIGN, x), _part(g, KINKS.abs, g.op(Op.EQ, x, g.const(0))))


def relu(g: Graph, x: int) -> int:
    """Node of relu; NaN stays NaN."""
    zero = g.const(0)
    return g.op(Op.WHERE, g.op(Op.LT if KINKS.relu else Op.LE, x, zero), zero, x)


def _part(g: Graph, share: float, x: int) -> int:
    return g.op(Op.MUL, g.const(share), x)


def _sum(g: Graph, shares: tuple[float, ...], dx: tuple[int, ...]) -> int:
    """Node of the sum of shares of derivatives; equal shares are factored out."""
    if len(shares) == 2 and shares[0] == shares[1]:
        return _part(g, shares[0], g.op(Op.ADD, *dx))
    total = g.const(0)
    for share, d in zip(shares, dx, strict=True):
        total = g.op(Op.ADD, total, _part(g, share, d))
    return total
