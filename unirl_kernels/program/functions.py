"""The torch functions that an objective may use in a one-pass kernel, and what each records."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

from unirl_kernels.program import kinks
from unirl_kernels.program.graph import Graph
from unirl_kernels.program.ir import ARITY, Op
from unirl_kernels.program.symbols import Symbol, UnsupportedOperation


def node_of(g: Graph, x: Any) -> int:
    """Node of an operand: a symbol, or a scalar, which becomes a run-time parameter."""
    if isinstance(x, Symbol):
        return x.node
    if isinstance(x, torch.Tensor):
        if x.requires_grad:
            raise UnsupportedOperation(
                "uses a tensor that requires a gradient, which one-pass kernels do not give it: detach it, or "
                "call fused_loss with Plan(kernel='composed'), which does"
            )
        if x.numel() != 1:
            raise UnsupportedOperation(f"uses a tensor of shape {tuple(x.shape)}; constants must be scalars")
        x = x.item()
    if isinstance(x, numbers.Integral):
        return g.param(int(x))
    if isinstance(x, numbers.Real):
        return g.param(float(x))
    raise UnsupportedOperation(f"uses an operand of type {type(x).__name__}; operands are tokens and numbers")


def _direct(op: Op) -> Callable[..., int]:
    def record(g: Graph, *args: Any) -> int:
        if len(args) != ARITY[op]:
            raise TypeError(f"operands must number {ARITY[op]}, not {len(args)}")
        return g.op(op, *(node_of(g, x) for x in args))

    return record


def _swapped(op: Op) -> Callable[..., int]:
    return lambda g, x, y: g.op(op, node_of(g, y), node_of(g, x))


def _is_truth(x: Any) -> bool | None:
    """Whether x is a truth value; None for a user's field, which may be one."""
    if isinstance(x, torch.Tensor):
        return x.dtype == torch.bool
    return x.truth if isinstance(x, Symbol) else isinstance(x, bool)


def _truth(g: Graph, x: Any) -> int:
    """Node of x != 0, as 1 or 0."""
    return node_of(g, x) if _is_truth(x) else _differ(g, x, 0)


def _condition(g: Graph, x: Any, use: str) -> int:
    """Node of a truth value that PyTorch wants to be one."""
    if _is_truth(x) is False:
        raise UnsupportedOperation(f"{use} what is not a truth value: compare it first, as in (x > 0)")
    return _truth(g, x)


def _differ(g: Graph, x: Any, y: Any) -> int:
    return g.op(Op.SUB, g.const(1), g.op(Op.EQ, node_of(g, x), node_of(g, y)))


def _not(g: Graph, x: Any) -> int:
    return g.op(Op.SUB, g.const(1), _truth(g, x))


def _and(g: Graph, x: Any, y: Any) -> int:
    return g.op(Op.MUL, _truth(g, x), _truth(g, y))


def _or(g: Graph, x: Any, y: Any) -> int:
    return g.op(Op.MAXIMUM, _truth(g, x), _truth(g, y))


def _bitwise(rule: Callable[..., int]) -> Callable[..., int]:
    def record(g: Graph, *args: Any) -> int:
        for x in args:
            _condition(g, x, "uses &, | or ~ on")
        return rule(g, *args)

    return record


def _extremum(op: Op) -> Callable[..., int]:
    def record(g: Graph, x: Any, other: Any) -> int:
        if not isinstance(x, (Symbol, torch.Tensor)) or not isinstance(other, (Symbol, torch.Tensor)):
            raise UnsupportedOperation(
                f"calls {op.name.lower()} with a plain number, which PyTorch takes for a dimension or refuses: "
                "bound by a number with clamp"
            )
        return g.op(op, node_of(g, x), node_of(g, other))

    return record


def _where(g: Graph, condition: Any, input: Any, other: Any) -> int:
    return g.op(Op.WHERE, _condition(g, condition, "chooses by"), node_of(g, input), node_of(g, other))


def _clamp(g: Graph, x: Any, min: Any = None, max: Any = None) -> int:
    if min is None and max is None:
        raise UnsupportedOperation("clamps without a bound")
    low = g.const(float("-inf")) if min is None else node_of(g, min)
    high = g.const(float("inf")) if max is None else node_of(g, max)
    return g.op(Op.CLAMP, node_of(g, x), low, high, value=_bounds(min, max))


def _bounds(*bounds: Any) -> str:
    """What the bounds of a clamp are. A constant tensor beside a number is a number to torch."""
    given = [x for x in bounds if x is not None]
    if not any(isinstance(x, numbers.Real) for x in given):
        return kinks.TENSORS
    if any(isinstance(x, Symbol) for x in given):
        raise UnsupportedOperation("clamps between a number and a tensor, which PyTorch refuses: clamp twice")
    return kinks.NUMBERS


def _relu(g: Graph, x: Any, inplace: bool = False) -> int:
    if inplace:
        raise UnsupportedOperation("calls relu in place, which would change a tensor of the batch")
    return kinks.relu(g, node_of(g, x))


def _power(g: Graph, x: Any, exponent: Any) -> int:
    base = node_of(g, x)
    if isinstance(exponent, Symbol):
        raise UnsupportedOperation("raises to a power that varies by token; exponents are numbers")
    if isinstance(exponent, torch.Tensor) and exponent.numel() == 1 and not exponent.requires_grad:
        exponent = exponent.item()
    if not isinstance(exponent, (int, float)):
        raise UnsupportedOperation(f"raises to the power {exponent!r}; exponents are numbers")
    if exponent == 0.5:
        return g.op(Op.SQRT, base)
    if exponent % 1 or not 1 <= abs(exponent) <= 8:
        return g.op(Op.POW, base, node_of(g, exponent))
    power = base
    for _ in range(abs(int(exponent)) - 1):
        power = g.op(Op.MUL, power, base)
    return power if exponent > 0 else g.op(Op.DIV, g.const(1), power)


def _softplus(g: Graph, x: Any, beta: float = 1, threshold: float = 20) -> int:
    if not isinstance(beta, (int, float)) or beta != 1:
        raise UnsupportedOperation("uses softplus with beta != 1: scale the argument and the result")
    at, limit = node_of(g, x), node_of(g, threshold)
    return g.op(Op.WHERE, g.op(Op.LT, limit, at), at, g.op(Op.NEG, g.op(Op.LOGSIGMOID, g.op(Op.NEG, at))))


def _is_nan(g: Graph, x: Any) -> int:
    return _differ(g, x, x)


def _is_finite(g: Graph, x: Any) -> int:
    return g.op(Op.LT, g.op(Op.ABS, node_of(g, x)), g.const(math.inf))


def _is_inf(g: Graph, x: Any) -> int:
    return g.op(Op.EQ, g.op(Op.ABS, node_of(g, x)), g.const(math.inf))


def _nan_to_num(g: Graph, x: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> int:
    node = given = node_of(g, x)
    above = g.largest() if posinf is None else node_of(g, posinf)
    below = g.negated(g.largest()) if neginf is None else node_of(g, neginf)
    for at, value in ((math.inf, above), (-math.inf, below)):
        node = g.op(Op.WHERE, g.op(Op.EQ, given, g.const(at)), value, node)
    return g.op(Op.WHERE, _is_nan(g, x), node_of(g, 0 if nan is None else nan), node)


def _masked_fill(g: Graph, x: Any, mask: Any, value: Any) -> int:
    return _where(g, mask, value, x)


def _logaddexp(g: Graph, x: Any, other: Any) -> int:
    """log(e^x + e^y); where both are the same infinity the difference would be NaN."""
    a, b = node_of(g, x), node_of(g, other)
    largest = g.op(Op.MAXIMUM, a, b)
    apart = g.op(Op.NEG, g.op(Op.ABS, g.op(Op.SUB, a, b)))
    value = g.op(Op.ADD, largest, g.op(Op.LOG1P, g.op(Op.EXP, apart)))
    same = g.op(Op.MUL, g.op(Op.EQ, a, b), _is_inf(g, x))
    return g.op(Op.WHERE, same, a, value)


def _lerp(g: Graph, x: Any, end: Any, weight: Any) -> int:
    start = node_of(g, x)
    return g.op(Op.ADD, start, g.op(Op.MUL, node_of(g, weight), g.op(Op.SUB, node_of(g, end), start)))


def _huber_loss(g: Graph, x: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Any = None) -> int:
    if reduction != "none" or weight is not None:
        raise UnsupportedOperation("calls huber_loss with a reduction or weights: a token has reduction='none'")
    bound = node_of(g, delta)
    size = g.op(Op.ABS, g.op(Op.SUB, node_of(g, x), node_of(g, target)))
    half = g.const(0.5)
    inside = g.op(Op.MUL, half, g.op(Op.MUL, size, size))
    outside = g.op(Op.MUL, bound, g.op(Op.SUB, size, g.op(Op.MUL, half, bound)))
    return g.op(Op.WHERE, g.op(Op.LE, size, bound), inside, outside)


def _to(g: Graph, x: Any, *how: Any, **named: Any) -> int:
    """A conversion. Kernels compute in fp32, fp64 for fp64 logits; what rounds further is refused."""
    for dtype in (*how, *named.values()):
        if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.float64):
            raise UnsupportedOperation(f"converts to {dtype}, which would round: one-pass kernels compute in float32")
    return node_of(g, x)


def _full_like(g: Graph, x: Any, fill_value: Any, **_: Any) -> int:
    return node_of(g, fill_value)


def _filled(value: float) -> Callable[..., int]:
    return lambda g, x, **_: g.const(value)


DIRECT = (
    *("abs", "add", "div", "eq", "exp", "expm1", "le", "log", "log1p"),
    *("logsigmoid", "lt", "mul", "neg", "sigmoid", "sign", "sqrt", "sub", "tanh"),
)
"""Instructions that are the torch function of their name."""

FUNCTIONS: dict[str, Callable[..., int]] = {name: _direct(Op[name.upper()]) for name in DIRECT} | {
    "bitwise_and": _bitwise(_and),
    "bitwise_not": _bitwise(_not),
    "bitwise_or": _bitwise(_or),
    "bool": lambda g, x: _differ(g, x, 0),
    "clamp": _clamp,
    "clamp_max": lambda g, x, max: _clamp(g, x, None, max),
    "clamp_min": lambda g, x, min: _clamp(g, x, min, None),
    "clip": _clamp,
    "detach": lambda g, x: g.detach(node_of(g, x)),
    "double": lambda g, x: node_of(g, x),
    "float": lambda g, x: node_of(g, x),
    "full_like": _full_like,
    "ge": _swapped(Op.LE),
    "gt": _swapped(Op.LT),
    "huber_loss": _huber_loss,
    "isfinite": _is_finite,
    "isinf": _is_inf,
    "isnan": _is_nan,
    "lerp": _lerp,
    "log_sigmoid": _direct(Op.LOGSIGMOID),
    "logaddexp": _logaddexp,
    "logical_and": _and,
    "logical_not": _not,
    "logical_or": _or,
    "masked_fill": _masked_fill,
    "max": _extremum(Op.MAXIMUM),
    "maximum": _extremum(Op.MAXIMUM),
    "min": _extremum(Op.MINIMUM),
    "minimum": _extremum(Op.MINIMUM),
    "nan_to_num": _nan_to_num,
    "ne": _differ,
    "ones_like": _filled(1),
    "pow": _power,
    "rdiv": _swapped(Op.DIV),
    "reciprocal": lambda g, x: g.op(Op.DIV, g.const(1), node_of(g, x)),
    "relu": _relu,
    "rsqrt": lambda g, x: g.op(Op.DIV, g.const(1), g.op(Op.SQRT, node_of(g, x))),
    "rsub": _swapped(Op.SUB),
    "softplus": _softplus,
    "square": lambda g, x: _power(g, x, 2),
    "to": _to,
    "true_divide": _direct(Op.DIV),
    "type_as": _to,
    "where": _where,
    "zeros_like": _filled(0),
}
"""Supported torch functions, by name."""


def _where_method(g: Graph, x: Any, condition: Any, other: Any) -> int:
    return _where(g, condition, x, other)


METHODS = FUNCTIONS | {"where": _where_method}
"""Supported tensor methods: ``where`` alone takes its operands in another order than the function."""

LOGIC = frozenset({"bitwise_and", "bitwise_not", "bitwise_or", "logical_and", "logical_not", "logical_or"})
TRUTHS = LOGIC | {"bool", "eq", "ge", "gt", "isfinite", "isinf", "isnan", "le", "lt", "ne"}
"""Functions whose value is a truth value, whatever they are given."""

OF_ONE_KIND = frozenset(
    {"detach", "max", "maximum", "min", "minimum", "mul", "ones_like", "sign", "where", "zeros_like"}
)
"""Functions whose value is a truth value where all operands are."""

NUMBERS_ONLY = frozenset({"abs", "log_sigmoid", "logsigmoid", "neg", "relu", "rsub", "softplus", "sub"})
"""Functions that PyTorch refuses where an operand is a truth value."""


def call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, method: bool) -> Symbol:
    """Record a call of the torch function ``name``, or of the tensor's method of that name.

    Raises:
        UnsupportedOperation: when one-pass kernels cannot run it.
    """
    graph = next((x.graph for x in (*args, *kwargs.values()) if isinstance(x, Symbol)), None)
    # Options such as inplace=False are bools, but no operands.
    operands = (*args, *(x for x in kwargs.values() if isinstance(x, (Symbol, torch.Tensor))))
    truths = [_is_truth(x) for x in operands]
    if (name in NUMBERS_ONLY and any(truths)) or (name == "add" and all(truths)):
        raise UnsupportedOperation(f"calls {name} on truth values: use .float() to calculate with them, or &, | and ~")
    if name not in FUNCTIONS or graph is None:
        raise UnsupportedOperation(f"uses {name}; one-pass kernels run {', '.join(sorted(FUNCTIONS))}")
    try:
        node = (METHODS if method else FUNCTIONS)[name](graph, *args, **kwargs)
    except TypeError as error:
        if isinstance(error, UnsupportedOperation):
            raise
        raise UnsupportedOperation(f"calls {name} in a form that one-pass kernels do not run ({error})") from None
    if not torch.is_grad_enabled():
        node = graph.detach(node)
    return Symbol(graph, node, _is_truth_value(name, truths))


def _is_truth_value(name: str, truths: list[bool | None]) -> bool | None:
    """Whether the value of a call is one, with operands that are or are not."""
    if name in TRUTHS:
        return True
    if name not in OF_ONE_KIND or False in truths:
        return False
    return None if None in truths else True


Symbol.functions = FUNCTIONS
Symbol.record = staticmethod(call)  # type: ignore[assignment]
