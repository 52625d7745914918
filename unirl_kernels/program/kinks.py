"""Derivatives at kinks: at bounds, at ties, at 0. PyTorch has changed some of them (clamp in 2.14).

When this module is imported, it asks the installed torch for them. It does not look them up by version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.program.graph import Expr, apply, equal, where
from unirl_kernels.program.ir import Op

Rule = Callable[[Expr, tuple[Expr, ...], tuple[Expr, ...]], Expr]
"""Derivative of an operation: rule(value, arguments, their derivatives)."""

NUMBERS, TENSORS = "numbers", "tensors"
"""The kinds of a clamp's bounds. torch has one function for each, and their derivatives differ at the bounds."""


def slopes(function: Callable[..., Tensor], *at: float) -> tuple[float, ...]:
    """Derivatives of one torch function with respect to each argument at a point, by autograd.

    Args:
        function: calls a single differentiable torch function on 0-dim float64 tensors.
        at: the point.
    """
    with torch.inference_mode(False), torch.enable_grad():
        value = function(*(torch.tensor(x, dtype=torch.float64, device="cpu", requires_grad=True) for x in at))
    # Call the node, not backward(): with a GPU autograd's engine starts threads, and a process with threads must not
    # fork.
    with torch.inference_mode(False), torch.no_grad():
        node: Any = value.grad_fn
        found = node(torch.ones((), dtype=torch.float64, device="cpu"))
    given = found if isinstance(found, tuple) else (found,)
    return tuple(float(x) for x in given[: len(at)])


@dataclass(frozen=True)
class Kinks:
    """The derivatives that autograd gives at the kinks.

    Args:
        tie: of minimum and maximum, for both arguments.
        abs: at 0.
        relu: at 0.
        number: of clamp, if x is at a bound that is a number.
        tensor: of clamp, if x is at a bound that is a tensor: for x, for the bound.
        both: of clamp, if x and both bounds are equal: for x, for the lower and for the upper bound.
        below: of clamp, if x is below two equal bounds: for x, for the lower and for the upper bound.
    """

    tie: tuple[float, ...]
    abs: float
    relu: float
    number: float
    tensor: tuple[float, ...]
    both: tuple[float, ...]
    below: tuple[float, ...]


def asked() -> Kinks:
    """``Kinks`` of the installed torch."""
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


def clamp(y: Expr, x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
    """Derivative of clamp. Outside of the bounds, a tensor bound gets it; if the bounds are reversed, the upper one.

    Args:
        y, x, dx: as for every rule; ``value`` of y is the kind of the bounds.
    """
    zero = y.graph.const(0)
    at_bound = KINKS.number * dx[0] if y.value == NUMBERS else _at_bounds(x, dx)
    between, inside = _within(x, Op.LT), _within(x, Op.LE)
    if dx[1] is dx[2] is zero:
        if at_bound is zero:
            return where(between, dx[0], zero)
        return where(inside, where(between, dx[0], at_bound), zero)
    at_bound = where(between, dx[0], at_bound)
    below = dx[1] if _open(x[2]) else where(x[1] < x[2], dx[1], _sum(KINKS.below, dx))
    above = where(x[2] < x[0], dx[2], zero)
    outside = where(x[0] < x[1], below, above)
    return where(x[2] < x[1], dx[2], where(inside, at_bound, outside))


def _within(x: tuple[Expr, ...], before: Op) -> Expr:
    """lower < x < upper, or <=; one comparison if there is only one bound."""
    value, low, high = x
    if _open(low):
        return apply(before, value, high)
    above = apply(before, low, value)
    return above if _open(high) else above * apply(before, value, high)


def _open(bound: Expr) -> bool:
    """Whether the bound is absent."""
    return bound.constant is not None and math.isinf(bound.constant)


def _at_bounds(x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
    """Derivative if x is at one bound or at both; the bounds are tensors."""
    at_low, at_high = equal(x[0], x[1]), equal(x[0], x[2])
    of_low = _sum(KINKS.tensor, dx[:2])
    of_high = where(at_high, _sum(KINKS.tensor, (dx[0], dx[2])), dx[0])
    if _open(x[1]):
        return of_high
    if _open(x[2]):
        return of_low
    return where(at_low, where(at_high, _sum(KINKS.both, dx), of_low), of_high)


def extremum(is_first: Callable[[Expr, Expr], Expr]) -> Rule:
    """Rule of minimum or maximum: the derivative of the chosen argument, a share of both at a tie, their sum if an
    argument is NaN.

    Args:
        is_first: is_first(x, y): whether x is the minimum, or the maximum, of x and y.
    """

    def rule(y: Expr, x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
        if dx[0] is dx[1]:
            return dx[0]
        first, second = is_first(x[0], x[1]), is_first(x[1], x[0])
        if_first = where(second, _sum(KINKS.tie, dx), dx[0])
        return where(first, if_first, where(second, dx[1], dx[0] + dx[1]))

    return rule


def relu(x: Expr) -> Expr:
    """relu; NaN stays NaN."""
    return where(x < 0 if KINKS.relu else x <= 0, 0, x)


def _sum(shares: tuple[float, ...], dx: tuple[Expr, ...]) -> Expr:
    """The sum of shares of derivatives; equal shares are factored out."""
    if len(shares) == 2 and shares[0] == shares[1]:
        return shares[0] * (dx[0] + dx[1])
    total = dx[0].graph.const(0)
    for share, d in zip(shares, dx, strict=True):
        total = total + share * d
    return total
