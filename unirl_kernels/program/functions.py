"""The torch functions that an objective may use in a one-pass kernel, and the expressions that they record."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

from unirl_kernels.program import kinks
from unirl_kernels.program.graph import Expr, Graph, apply, equal, where
from unirl_kernels.program.ir import Op
from unirl_kernels.program.operands import (
    FLOAT64,
    Operand,
    UnsupportedOperation,
    condition_of,
    demand,
    expr_of,
    is_truth,
    truth_of,
    wide_inputs,
)

Function = Callable[..., Expr]
"""Called with the graph and the arguments of the torch function."""


def _direct(op: Op) -> Function:
    def record(g: Graph, *args: Any) -> Expr:
        if len(args) != op.arity:
            raise TypeError(f"operands must number {op.arity}, not {len(args)}")
        return apply(op, *(expr_of(g, x) for x in args))

    return record


def _of(rule: Callable[..., Expr]) -> Function:
    """A function defined by an equation; all its arguments are numbers of a token."""
    return lambda g, *args, **named: rule(
        *(expr_of(g, x) for x in args), **{name: expr_of(g, x) for name, x in named.items()}
    )


def _unequal(x: Expr, y: Expr) -> Expr:
    return 1 - equal(x, y)


def _is_inf(x: Expr) -> Expr:
    return equal(apply(Op.ABS, x), math.inf)


def _logaddexp(x: Expr, other: Expr) -> Expr:
    """log(e^x + e^y). If both are the same infinity, their difference would be NaN."""
    largest = apply(Op.MAXIMUM, x, other)
    value = largest + apply(Op.LOG1P, apply(Op.EXP, -apply(Op.ABS, x - other)))
    return where(equal(x, other) * _is_inf(x), x, value)


def _not(g: Graph, x: Any) -> Expr:
    return 1 - truth_of(g, x)


def _and(g: Graph, x: Any, y: Any) -> Expr:
    return truth_of(g, x) * truth_of(g, y)


def _or(g: Graph, x: Any, y: Any) -> Expr:
    return apply(Op.MAXIMUM, truth_of(g, x), truth_of(g, y))


def _bitwise(rule: Function) -> Function:
    def record(g: Graph, *args: Any) -> Expr:
        for x in args:
            condition_of(g, x, "uses &, | or ~ on")
        return rule(g, *args)

    return record


def _extremum(op: Op) -> Function:
    def record(g: Graph, x: Any, other: Any) -> Expr:
        if not isinstance(x, (Operand, torch.Tensor)) or not isinstance(other, (Operand, torch.Tensor)):
            raise UnsupportedOperation(
                f"calls {op.name.lower()} with a plain number, which PyTorch takes as a dimension or refuses: "
                "use clamp for a bound that is a number"
            )
        return apply(op, expr_of(g, x), expr_of(g, other))

    return record


def _where(g: Graph, condition: Any, input: Any, other: Any) -> Expr:
    return where(condition_of(g, condition, "chooses by"), expr_of(g, input), expr_of(g, other))


def _clamp(g: Graph, x: Any, min: Any = None, max: Any = None) -> Expr:
    if min is None and max is None:
        raise UnsupportedOperation("clamps without a bound")
    low = g.const(-math.inf) if min is None else expr_of(g, min)
    high = g.const(math.inf) if max is None else expr_of(g, max)
    return apply(Op.CLAMP, expr_of(g, x), low, high, value=_bounds(min, max))


def _bounds(*bounds: Any) -> str:
    """The kind of a clamp's bounds. With a number as the other bound, torch takes a constant tensor as a number."""
    given = [x for x in bounds if x is not None]
    if not any(isinstance(x, numbers.Real) for x in given):
        return kinks.TENSORS
    if any(isinstance(x, Operand) for x in given):
        raise UnsupportedOperation("clamps between a number and a tensor, which PyTorch refuses: clamp twice")
    return kinks.NUMBERS


def _relu(g: Graph, x: Any, inplace: bool = False) -> Expr:
    if inplace:
        raise UnsupportedOperation("calls relu in place, which would change a tensor of the batch")
    return kinks.relu(expr_of(g, x))


def _power(g: Graph, x: Any, exponent: Any) -> Expr:
    base = expr_of(g, x)
    if isinstance(exponent, Operand):
        raise UnsupportedOperation("raises to a power that varies by token; exponents are numbers")
    if isinstance(exponent, torch.Tensor) and exponent.numel() == 1 and not exponent.requires_grad:
        exponent = exponent.item()
    if not isinstance(exponent, (int, float)):
        raise UnsupportedOperation(f"raises to the power {exponent!r}; exponents are numbers")
    if exponent == 0.5:
        return apply(Op.SQRT, base)
    if isinstance(exponent, int) and exponent < 0:
        demand("float", "raises to a negative integer power", x)
    if exponent == -1:
        return 1 / base
    # Not 1 / (x * x) for x ** -2: where x is 0, its derivative would be infinite times 0.
    if exponent % 1 or not 1 <= exponent <= 8:
        return apply(Op.POW, base, expr_of(g, exponent))
    power = base
    for _ in range(int(exponent) - 1):
        power = power * base
    return power


def _softplus(g: Graph, x: Any, beta: float = 1, threshold: float = 20) -> Expr:
    if not isinstance(beta, (int, float)) or beta != 1:
        raise UnsupportedOperation("uses softplus with beta != 1: scale the argument and the result")
    at, limit = expr_of(g, x), expr_of(g, threshold)
    return where(limit < at, at, -apply(Op.LOGSIGMOID, -at))


def _nan_to_num(g: Graph, x: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Expr:
    given, wide = expr_of(g, x), wide_inputs(x)
    above = g.largest(wide) if posinf is None else expr_of(g, posinf)
    below = -g.largest(wide) if neginf is None else expr_of(g, neginf)
    finite = where(equal(given, -math.inf), below, where(equal(given, math.inf), above, given))
    return where(_unequal(given, given), 0 if nan is None else expr_of(g, nan), finite)


def _huber_loss(g: Graph, x: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Any = None) -> Expr:
    if reduction != "none" or weight is not None:
        raise UnsupportedOperation("calls huber_loss with a reduction or weights: a token has reduction='none'")
    bound = expr_of(g, delta)
    size = apply(Op.ABS, expr_of(g, x) - expr_of(g, target))
    return where(size <= bound, 0.5 * (size * size), bound * (size - 0.5 * bound))


def _to(g: Graph, x: Any, *how: Any, **named: Any) -> Expr:
    """A conversion. Kernels compute in fp32, or fp64 for fp64 logits; a conversion to a narrower dtype is refused."""
    for like in (*how, *named.values()):
        _check_dtype("converts to", like)
        if isinstance(like, (Operand, torch.Tensor)):
            demand_floating("converts to the dtype of", like)
    return expr_of(g, x)


def _check_dtype(use: str, dtype: Any) -> None:
    if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.float64):
        raise UnsupportedOperation(f"{use} {dtype}, which would round: one-pass kernels compute in float32")


def demand_floating(use: str, x: Any) -> None:
    """Note that x must have a floating dtype."""
    if isinstance(x, torch.Tensor):
        _check_dtype(use, x.dtype)
    else:
        demand("float", use, x)


def _like(fill: float) -> Function:
    def record(g: Graph, x: Any, *, dtype: Any = None, **_: Any) -> Expr:
        _check_dtype("fills a tensor of", dtype)
        return g.param(fill)

    return record


def _full_like(g: Graph, x: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> Expr:
    _check_dtype("fills a tensor of", dtype)
    if dtype is None:
        _demand_room("calls full_like with this value on", x, fill_value)
    return expr_of(g, fill_value)


def _masked_fill(g: Graph, x: Any, mask: Any, value: Any) -> Expr:
    _demand_room("calls masked_fill with this value on", x, value)
    return _where(g, mask, value, x)


def _demand_room(use: str, x: Any, value: Any) -> None:
    """Note that the dtype of x must hold a value, to which PyTorch converts it."""
    if isinstance(value, (Operand, torch.Tensor)) or value % 1:
        demand_floating(use, x)
    elif value not in (0, 1) and is_truth(x) is not False:
        demand("number", use, x)


FUNCTIONS: dict[str, Function] = {op.name.lower(): _direct(op) for op in Op} | {
    "bitwise_and": _bitwise(_and),
    "bitwise_not": _bitwise(_not),
    "bitwise_or": _bitwise(_or),
    "bool": _of(lambda x: _unequal(x, x.graph.const(0))),
    "clamp": _clamp,
    "clamp_max": lambda g, x, max: _clamp(g, x, None, max),
    "clamp_min": lambda g, x, min: _clamp(g, x, min, None),
    "clip": _clamp,
    "detach": lambda g, x: g.detach(expr_of(g, x)),
    "double": _of(lambda x: x),
    "float": _of(lambda x: x),
    "full_like": _full_like,
    "ge": _of(lambda x, y: y <= x),
    "gt": _of(lambda x, y: y < x),
    "huber_loss": _huber_loss,
    "isfinite": _of(lambda x: apply(Op.ABS, x) < math.inf),
    "isinf": _of(_is_inf),
    "isnan": _of(lambda x: _unequal(x, x)),
    "lerp": _of(lambda x, end, weight: x + weight * (end - x)),
    "log_sigmoid": _direct(Op.LOGSIGMOID),
    "logaddexp": _of(_logaddexp),
    "logical_and": _and,
    "logical_not": _not,
    "logical_or": _or,
    "masked_fill": _masked_fill,
    "max": _extremum(Op.MAXIMUM),
    "maximum": _extremum(Op.MAXIMUM),
    "min": _extremum(Op.MINIMUM),
    "minimum": _extremum(Op.MINIMUM),
    "nan_to_num": _nan_to_num,
    "ne": _of(_unequal),
    "ones_like": _like(1),
    "pow": _power,
    "rdiv": _of(lambda x, y: y / x),
    "reciprocal": _of(lambda x: 1 / x),
    "relu": _relu,
    "rsqrt": _of(lambda x: 1 / apply(Op.SQRT, x)),
    "rsub": _of(lambda x, y: y - x),
    "softplus": _softplus,
    "square": _of(lambda x: x * x),
    "to": _to,
    "true_divide": _direct(Op.DIV),
    "type_as": _to,
    "where": _where,
    "zeros_like": _like(0),
}
"""Supported torch functions, by name. Operations of programs are torch functions of the same name, unless the table has
another definition."""

METHODS = FUNCTIONS | {"where": lambda g, x, condition, other: _where(g, condition, x, other)}
"""Supported tensor methods. Only ``where`` takes its operands in another order than the function."""

LOGIC = frozenset({"bitwise_and", "bitwise_not", "bitwise_or", "logical_and", "logical_not", "logical_or"})
TRUTHS = LOGIC | {"bool", "eq", "ge", "gt", "isfinite", "isinf", "isnan", "le", "lt", "ne"}
"""Functions that always return a truth value."""

OF_ONE_KIND = frozenset(
    {"detach", "max", "maximum", "min", "minimum", "mul", "ones_like", "sign", "where", "zeros_like"}
)
"""Functions that return a truth value if all operands are truth values."""

OF_THE_FIRST = frozenset({"full_like", "masked_fill", "nan_to_num", "to"})
"""Functions that keep the dtype of their first operand, unless another is given."""

NUMBERS_ONLY = frozenset(
    {"abs", "huber_loss", "lerp", "log_sigmoid", "logsigmoid", "neg", "relu", "rsub", "softplus", "sub"}
)
"""Functions that PyTorch refuses if an operand is a truth value."""


def record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, method: bool) -> Operand:
    """Record a call of the torch function ``name``, or of the tensor's method of that name.

    Raises:
        UnsupportedOperation: when one-pass kernels cannot run it.
    """
    graph = next((x.expr.graph for x in (*args, *kwargs.values()) if isinstance(x, Operand)), None)
    # Options such as inplace=False are bools, but not operands.
    operands = (*args, *(x for x in kwargs.values() if isinstance(x, (Operand, torch.Tensor))))
    truths = [is_truth(x) for x in operands]
    _check_numbers(name, operands, truths)
    if name not in FUNCTIONS or graph is None:
        raise UnsupportedOperation(f"uses {name}; one-pass kernels run {', '.join(sorted(FUNCTIONS))}")
    try:
        expr = (METHODS if method else FUNCTIONS)[name](graph, *args, **kwargs)
    except TypeError as error:
        if isinstance(error, UnsupportedOperation):
            raise
        raise UnsupportedOperation(f"calls {name} in a form that one-pass kernels do not run ({error})") from None
    if not torch.is_grad_enabled():
        expr = graph.detach(expr)
    return Operand(expr, _is_truth_value(name, args, kwargs, truths), _wide(name, [*args, *kwargs.values()]))


def _check_numbers(name: str, operands: tuple[Any, ...], truths: list[bool | None]) -> None:
    """Refuse arithmetic on truth values, or note that a user's fields must not be truth values."""
    if (name in NUMBERS_ONLY and any(truths)) or (name == "add" and all(truths)):
        raise UnsupportedOperation(f"calls {name} on truth values: use .float() to calculate with them, or &, | and ~")
    unknown = [x for x, truth in zip(operands, truths, strict=True) if truth is None]
    if name in NUMBERS_ONLY:
        for x in unknown:
            demand("number", f"calls {name} on", x)
    elif name in ("add", "clamp", "clamp_max", "clamp_min", "clip") and unknown and False not in truths:
        demand("number", f"calls {name} on", *unknown)


def _is_truth_value(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], truths: list[bool | None]) -> bool | None:
    """Whether a call returns a truth value, for operands that are truth values or not."""
    if name in TRUTHS:
        return True
    dtypes = (torch.dtype, Operand, torch.Tensor) if name == "to" else torch.dtype
    if any(isinstance(x, dtypes) for x in (*args[1:], *kwargs.values())):
        return False if name in OF_THE_FIRST or name.endswith("_like") else _of_one_kind(name, truths)
    return truths[0] if name in OF_THE_FIRST else _of_one_kind(name, truths)


def _of_one_kind(name: str, truths: list[bool | None]) -> bool | None:
    if name not in OF_ONE_KIND or False in truths:
        return False
    return None if None in truths else True


def _wide(name: str, values: list[Any]) -> frozenset[str]:
    """``Operand.wide`` of the value of a call with these arguments."""
    dtypes = [x for x in values if isinstance(x, torch.dtype)] + [torch.float64] * (name == "double")
    if dtypes:
        return frozenset({FLOAT64} if torch.float64 in dtypes else ())
    if name == "float" or name in TRUTHS:
        return frozenset()
    if name in ("to", "type_as"):
        values = [x for x in values[1:] if isinstance(x, Operand)] or values[:1]
    return wide_inputs(*values)
