"""Reads an objective: runs it once on symbols and records what it computes."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from unirl_kernels.program.graph import Graph, assemble
from unirl_kernels.program.ir import ARITY, INPUTS, Op, Program

WAY_OUT = "Run it with Plan(kernel='composed'): statistics first, then the objective as plain PyTorch under autograd"


class UnsupportedOperation(TypeError):
    """An objective uses an operation that the one-pass kernels cannot run."""


@dataclass(frozen=True)
class Traced:
    """What tracing found.

    Args:
        program: the loss and its derivatives, shared by all values of the objective's scalars.
        params: values of the program's parameters.
        code: the program encoded as text, the form in which operators take it.
        reads: names of the inputs that the program reads.
        graph, loss: the expressions it was made from, for ``explain``.
    """

    program: Program
    params: tuple[float, ...]
    code: str
    reads: frozenset[str]
    graph: Graph
    loss: int


def trace(objective: Callable[[Any], Any]) -> Traced:
    """Record a token-scope objective and differentiate it.

    Raises:
        UnsupportedOperation: naming the operation, and the way out.
    """
    graph = Graph()
    try:
        loss = _node(graph, objective(SymbolicTokens(graph)))
        program, params = assemble(graph, loss)
    except UnsupportedOperation as error:
        raise UnsupportedOperation(f"objective {_name(objective)} {error}. {WAY_OUT}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedOperation(f"objective {_name(objective)} cannot be traced ({reason}). {WAY_OUT}") from error
    return Traced(program, params, " ".join(map(str, program.encode())), program.reads, graph, loss)


def _name(objective: Callable[[Any], Any]) -> str:
    return getattr(objective, "__name__", type(objective).__name__)


class SymbolicTokens:
    """Stands in for the tokens while an objective is traced."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Symbol:
        if name in INPUTS:
            return Symbol(self._graph, self._graph.input(name))
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedOperation(f"reads t.{name}; one-pass kernels offer {', '.join(INPUTS)}")


class Symbol:
    """A scalar that remembers how it was computed. Behaves like a tensor for the supported operations.

    Args:
        graph, node: the expression.
        truth: whether a tensor in its place would be of dtype bool, whose arithmetic differs from that of numbers.
    """

    def __init__(self, graph: Graph, node: int, truth: bool = False) -> None:
        self._graph = graph
        self.node = node
        self.truth = truth

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Symbol:
        name = getattr(func, "__name__", str(func))
        table = METHODS if func is getattr(torch.Tensor, name, None) else FUNCTIONS
        return _call(name, args, kwargs or {}, table)

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in FUNCTIONS:
            raise UnsupportedOperation(f"uses .{name}; one-pass kernels run {', '.join(sorted(FUNCTIONS))}")
        return lambda *args, **kwargs: _call(name, (self, *args), kwargs, METHODS)

    def __add__(self, y: Any) -> Symbol:
        return _call("add", (self, y), {})

    def __sub__(self, y: Any) -> Symbol:
        return _call("sub", (self, y), {})

    def __rsub__(self, y: Any) -> Symbol:
        return _call("rsub", (self, y), {})

    def __mul__(self, y: Any) -> Symbol:
        return _call("mul", (self, y), {})

    def __truediv__(self, y: Any) -> Symbol:
        return _call("div", (self, y), {})

    def __rtruediv__(self, y: Any) -> Symbol:
        return _call("rdiv", (self, y), {})

    def __pow__(self, y: Any) -> Symbol:
        return _call("pow", (self, y), {})

    def __neg__(self) -> Symbol:
        return _call("neg", (self,), {})

    def __abs__(self) -> Symbol:
        return _call("abs", (self,), {})

    def __lt__(self, y: Any) -> Symbol:
        return _call("lt", (self, y), {})

    def __le__(self, y: Any) -> Symbol:
        return _call("le", (self, y), {})

    def __gt__(self, y: Any) -> Symbol:
        return _call("gt", (self, y), {})

    def __ge__(self, y: Any) -> Symbol:
        return _call("ge", (self, y), {})

    def __eq__(self, y: Any) -> Symbol:  # type: ignore[override]
        return _call("eq", (self, y), {})

    def __ne__(self, y: Any) -> Symbol:  # type: ignore[override]
        return _call("ne", (self, y), {})

    def __and__(self, y: Any) -> Symbol:
        return _call("bitwise_and", (self, y), {})

    def __or__(self, y: Any) -> Symbol:
        return _call("bitwise_or", (self, y), {})

    def __invert__(self) -> Symbol:
        return _call("bitwise_not", (self,), {})

    __radd__ = __add__
    __rmul__ = __mul__
    __rand__ = __and__
    __ror__ = __or__
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> NoReturn:
        raise UnsupportedOperation("branches on the value of a token: choose with torch.where")

    def __float__(self) -> NoReturn:
        raise UnsupportedOperation("turns a token's value into a Python number: use torch functions, not math")

    __int__ = __index__ = __float__

    def __iter__(self) -> NoReturn:
        raise UnsupportedOperation("iterates over tokens, which a one-pass kernel sees one at a time")

    def __getitem__(self, index: Any) -> NoReturn:
        raise UnsupportedOperation("indexes tokens, which a one-pass kernel sees one at a time")

    def __len__(self) -> NoReturn:
        raise UnsupportedOperation("asks for the number of tokens, of which a one-pass kernel sees one at a time")


def _node(g: Graph, x: Any) -> int:
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
    if isinstance(x, numbers.Real):
        return g.param(float(x))
    raise UnsupportedOperation(f"uses an operand of type {type(x).__name__}; operands are tokens and numbers")


def _direct(op: Op) -> Callable[..., int]:
    def record(g: Graph, *args: Any) -> int:
        if len(args) != ARITY[op]:
            raise TypeError(f"operands must number {ARITY[op]}, not {len(args)}")
        return g.op(op, *(_node(g, x) for x in args))

    return record


def _swapped(op: Op) -> Callable[..., int]:
    return lambda g, x, y: g.op(op, _node(g, y), _node(g, x))


def _is_truth(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return x.dtype == torch.bool
    return x.truth if isinstance(x, Symbol) else isinstance(x, bool)


def _truth(g: Graph, x: Any) -> int:
    """Node of x != 0, as 1 or 0."""
    return _node(g, x) if _is_truth(x) else _differ(g, x, 0)


def _differ(g: Graph, x: Any, y: Any) -> int:
    return g.op(Op.SUB, g.const(1), g.op(Op.EQ, _node(g, x), _node(g, y)))


def _not(g: Graph, x: Any) -> int:
    return g.op(Op.SUB, g.const(1), _truth(g, x))


def _and(g: Graph, x: Any, y: Any) -> int:
    return g.op(Op.MUL, _truth(g, x), _truth(g, y))


def _or(g: Graph, x: Any, y: Any) -> int:
    return g.op(Op.MAXIMUM, _truth(g, x), _truth(g, y))


def _bitwise(rule: Callable[..., int]) -> Callable[..., int]:
    def record(g: Graph, *args: Any) -> int:
        if not all(_is_truth(x) for x in args):
            raise UnsupportedOperation("uses &, | or ~ on what is not a truth value: compare it first, as in (x > 0)")
        return rule(g, *args)

    return record


def _extremum(op: Op) -> Callable[..., int]:
    def record(g: Graph, x: Any, other: Any) -> int:
        if not isinstance(x, (Symbol, torch.Tensor)) or not isinstance(other, (Symbol, torch.Tensor)):
            raise UnsupportedOperation(
                f"calls {op.name.lower()} with a plain number, which PyTorch takes for a dimension or refuses: "
                "bound by a number with clamp"
            )
        return g.op(op, _node(g, x), _node(g, other))

    return record


def _where(g: Graph, condition: Any, input: Any, other: Any) -> int:
    if not _is_truth(condition):
        raise UnsupportedOperation("chooses by what is not a truth value: compare it first, as in (x != 0)")
    return g.op(Op.WHERE, _node(g, condition), _node(g, input), _node(g, other))


def _clamp(g: Graph, x: Any, min: Any = None, max: Any = None) -> int:
    if min is None and max is None:
        raise UnsupportedOperation("clamps without a bound")
    if isinstance(min, Symbol) or isinstance(max, Symbol):
        raise UnsupportedOperation("clamps to bounds that vary by token: use torch.minimum and torch.maximum")
    low = g.const(float("-inf")) if min is None else _node(g, min)
    high = g.const(float("inf")) if max is None else _node(g, max)
    return g.op(Op.CLAMP, _node(g, x), low, high)


def _relu(g: Graph, x: Any) -> int:
    zero = g.const(0)
    return g.op(Op.WHERE, g.op(Op.LE, _node(g, x), zero), zero, _node(g, x))  # NaN stays NaN


def _power(g: Graph, x: Any, exponent: Any) -> int:
    base = _node(g, x)
    if isinstance(exponent, Symbol):
        raise UnsupportedOperation("raises to a power that varies by token; supported are 0.5 and integers up to 8")
    if isinstance(exponent, torch.Tensor) and exponent.numel() == 1 and not exponent.requires_grad:
        exponent = exponent.item()
    if isinstance(exponent, float) and exponent == 0.5:
        return g.op(Op.SQRT, base)
    if not isinstance(exponent, (int, float)) or exponent % 1 or not 1 <= abs(exponent) <= 8:
        raise UnsupportedOperation(f"raises to the power {exponent}; supported are 0.5 and integers up to 8")
    power = base
    for _ in range(abs(int(exponent)) - 1):
        power = g.op(Op.MUL, power, base)
    return power if exponent > 0 else g.op(Op.DIV, g.const(1), power)


def _softplus(g: Graph, x: Any, beta: float = 1, threshold: float = 20) -> int:
    if not isinstance(beta, (int, float)) or beta != 1:
        raise UnsupportedOperation("uses softplus with beta != 1: scale the argument and the result")
    return g.op(Op.NEG, g.op(Op.LOGSIGMOID, g.op(Op.NEG, _node(g, x))))


def _filled(value: float) -> Callable[..., int]:
    return lambda g, x, **_: g.const(value)


FUNCTIONS: dict[str, Callable[..., int]] = {
    "abs": _direct(Op.ABS),
    "add": _direct(Op.ADD),
    "bitwise_and": _bitwise(_and),
    "bitwise_not": _bitwise(_not),
    "bitwise_or": _bitwise(_or),
    "clamp": _clamp,
    "clamp_max": lambda g, x, max: _clamp(g, x, None, max),
    "clamp_min": lambda g, x, min: _clamp(g, x, min, None),
    "clip": _clamp,
    "detach": lambda g, x: g.detach(_node(g, x)),
    "div": _direct(Op.DIV),
    "eq": _direct(Op.EQ),
    "exp": _direct(Op.EXP),
    "expm1": _direct(Op.EXPM1),
    "float": lambda g, x: _node(g, x),
    "ge": _swapped(Op.LE),
    "gt": _swapped(Op.LT),
    "le": _direct(Op.LE),
    "log": _direct(Op.LOG),
    "log1p": _direct(Op.LOG1P),
    "log_sigmoid": _direct(Op.LOGSIGMOID),
    "logical_and": _and,
    "logical_not": _not,
    "logical_or": _or,
    "logsigmoid": _direct(Op.LOGSIGMOID),
    "lt": _direct(Op.LT),
    "max": _extremum(Op.MAXIMUM),
    "maximum": _extremum(Op.MAXIMUM),
    "min": _extremum(Op.MINIMUM),
    "minimum": _extremum(Op.MINIMUM),
    "mul": _direct(Op.MUL),
    "ne": _differ,
    "neg": _direct(Op.NEG),
    "ones_like": _filled(1),
    "pow": _power,
    "rdiv": _swapped(Op.DIV),
    "reciprocal": lambda g, x: g.op(Op.DIV, g.const(1), _node(g, x)),
    "relu": _relu,
    "rsub": _swapped(Op.SUB),
    "sigmoid": _direct(Op.SIGMOID),
    "sign": _direct(Op.SIGN),
    "softplus": _softplus,
    "sqrt": _direct(Op.SQRT),
    "square": lambda g, x: _power(g, x, 2),
    "sub": _direct(Op.SUB),
    "tanh": _direct(Op.TANH),
    "true_divide": _direct(Op.DIV),
    "where": _where,
    "zeros_like": _filled(0),
}
"""Supported torch functions, by name."""


def _where_method(g: Graph, x: Any, condition: Any, other: Any) -> int:
    return _where(g, condition, x, other)


METHODS = FUNCTIONS | {"where": _where_method}
"""Supported tensor methods: ``where`` alone takes its operands in another order than the function."""

LOGIC = frozenset({"bitwise_and", "bitwise_not", "bitwise_or", "logical_and", "logical_not", "logical_or"})
TRUTHS = LOGIC | {"eq", "ge", "gt", "le", "lt", "ne"}
"""Functions whose value is a truth value, whatever they are given."""

OF_ONE_KIND = frozenset(
    {"detach", "max", "maximum", "min", "minimum", "mul", "ones_like", "sign", "where", "zeros_like"}
)
"""Functions whose value is a truth value where all operands are."""

NUMBERS_ONLY = frozenset({"abs", "log_sigmoid", "logsigmoid", "neg", "relu", "rsub", "softplus", "sub"})
"""Functions that PyTorch refuses where an operand is a truth value."""


def _call(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], table: dict[str, Callable[..., int]] | None = None
) -> Symbol:
    graph = next((x._graph for x in (*args, *kwargs.values()) if isinstance(x, Symbol)), None)
    truths = [_is_truth(x) for x in (*args, *kwargs.values())]
    if (name in NUMBERS_ONLY and any(truths)) or (name == "add" and all(truths)):
        raise UnsupportedOperation(f"calls {name} on truth values: use .float() to calculate with them, or &, | and ~")
    if name not in FUNCTIONS or graph is None:
        raise UnsupportedOperation(f"uses {name}; one-pass kernels run {', '.join(sorted(FUNCTIONS))}")
    try:
        node = (table or FUNCTIONS)[name](graph, *args, **kwargs)
    except TypeError as error:
        if isinstance(error, UnsupportedOperation):
            raise
        raise UnsupportedOperation(f"calls {name} in a form that one-pass kernels do not run ({error})") from None
    return Symbol(graph, node, name in TRUTHS or (name in OF_ONE_KIND and all(truths)))
