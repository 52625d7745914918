"""The operands of torch functions while an objective is traced."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from unirl_kernels.program.graph import Expr, Graph, equal
from unirl_kernels.program.ir import STATISTICS, Op


class UnsupportedOperation(TypeError):
    """An objective uses an operation that the one-pass kernels cannot run.

    The message names the operation, lists the supported ones, and says how to run the objective anyway.

    Examples:
        >>> loss = uk.Loss(lambda t: torch.special.i0(t.logp))
        >>> try:
        ...     loss.traced()
        ... except uk.UnsupportedOperation as error:
        ...     print("special_i0" in str(error), "Plan(kernel='composed')" in str(error))
        True True
    """


FLOAT64 = "torch.float64"
"""An entry among names of fields. It is not an identifier, so no field can have this name."""


DEMANDS = {"bool": "bool", "number": "a number, not bool", "float": "of a floating dtype"}
"""What an operation can require of the dtype of its operands, and how errors say it. ``bool`` requires it of each field
that the dtype depends on, the others of one of them: PyTorch promotes to it."""


class Operand:
    """A scalar of one token.

    Args:
        expr: how it is computed.
        truth: whether it is of dtype bool in PyTorch, whose arithmetic differs from that of numbers. None for a user's
            field, which may be bool or not.
        wide: what may make it wider than the rows in PyTorch: the fields that its dtype depends on, and ``FLOAT64`` if
            it was converted to float64.
    """

    def __init__(self, expr: Expr, truth: bool | None = False, wide: frozenset[str] = frozenset()) -> None:
        self.expr = expr
        self.truth = truth
        self.wide = wide


def expr_of(g: Graph, x: Any) -> Expr:
    """The expression of an operand: a symbol's, or a scalar, which becomes a run-time parameter."""
    if isinstance(x, Operand):
        return x.expr
    if isinstance(x, torch.Tensor):
        if x.requires_grad:
            raise UnsupportedOperation(
                "uses a tensor that requires a gradient, which one-pass kernels do not compute: detach it, or "
                "call fused_loss with Plan(kernel='composed')"
            )
        if x.numel() != 1:
            raise UnsupportedOperation(f"uses a tensor of shape {tuple(x.shape)}; constants must be scalars")
        x = x.item()
    if isinstance(x, numbers.Integral):
        return g.param(int(x))
    if isinstance(x, numbers.Real):
        return g.param(float(x))
    raise UnsupportedOperation(f"uses an operand of type {type(x).__name__}; operands are tokens and numbers")


def is_truth(x: Any) -> bool | None:
    """Whether x is a truth value; None for a user's field, which may be one."""
    if isinstance(x, torch.Tensor):
        return x.dtype == torch.bool
    return x.truth if isinstance(x, Operand) else isinstance(x, bool)


def wide_inputs(*operands: Any) -> frozenset[str]:
    """``Operand.wide`` of a result, as torch promotes dtypes: numbers and 0-dim tensors do not count."""
    found: set[str] = set()
    for x in operands:
        if isinstance(x, Operand):
            found |= x.wide
        elif isinstance(x, torch.Tensor) and x.dim() and x.dtype == torch.float64:
            found.add(FLOAT64)
    return frozenset(found)


def truth_of(g: Graph, x: Any) -> Expr:
    """x != 0, as 1 or 0."""
    expr = expr_of(g, x)
    return expr if is_truth(x) else 1 - equal(expr, 0)


FLOATING = {Op.DIV, Op.EXP, Op.EXPM1, Op.LOG, Op.LOG1P, Op.SQRT, Op.TANH, Op.SIGMOID, Op.LOGSIGMOID}
"""Operations whose value has a floating dtype, whatever their arguments have."""


def _is_floating(x: Expr) -> bool:
    """Whether x has a floating dtype for fields of any dtype."""
    seen, stack = set(), [x]
    while stack:
        x = stack.pop()
        if x.kind in FLOATING or (x.kind == "input" and x.value in STATISTICS):
            return True
        if x not in seen and x.kind not in (Op.LT, Op.LE, Op.EQ):
            seen.add(x)
            stack.extend(x.args[1:] if x.kind is Op.WHERE else x.args)
    return False


def demand(kind: str, use: str, *operands: Any) -> None:
    """Note what the dtypes of fields must be for a use of operands, since PyTorch would refuse it or compute something
    else; the dtypes are known when a batch is.

    Raises:
        UnsupportedOperation: when it is known already that the use has no such operand.
    """
    symbols = [x for x in operands if isinstance(x, Operand)]
    if kind == "float" and any(_is_floating(x.expr) for x in symbols):
        return
    names = tuple(sorted({name for x in symbols for name in x.wide}))
    if any(map(is_truth, symbols)) and not names:
        raise UnsupportedOperation(f"{use} what is not {DEMANDS[kind]}: use .float() first")
    if not names or FLOAT64 in names:
        return
    symbols[0].expr.graph.demands[kind, names, use] = None


def condition_of(g: Graph, x: Any, use: str) -> Expr:
    """``truth_of`` of an operand that PyTorch requires to be a truth value."""
    if is_truth(x) is False:
        raise UnsupportedOperation(f"{use} what is not a truth value: compare it first, as in (x > 0)")
    if is_truth(x) is None:
        demand("bool", use, x)
    return truth_of(g, x)
