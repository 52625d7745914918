"""Scalar expressions: a hash-consed graph with simplification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from unirl_kernels.program.ir import Op

LARGEST_FP32 = (2 - 2.0**-23) * 2.0**127


def _binary(op: Op) -> Callable[[Expr, Expr | float], Expr]:
    return lambda x, y: apply(op, x, y)


def _reflected(op: Op) -> Callable[[Expr, float], Expr]:
    return lambda x, y: apply(op, y, x)


@dataclass(eq=False, repr=False)
class Expr:
    """One expression of a graph, with the operators of arithmetic. A number beside it is a constant.

    Equal expressions of a graph are one object, which does not change.

    Args:
        kind: an ``Op``, or ``input`` (a name), ``param`` (an index), ``const`` (a number), ``detach`` (the value of its
            argument, with derivative zero).
        args: what it is made of.
        value: name, index or number. Of a clamp: what its bounds are.
        graph, index: where it stands. Arguments stand before what is made of them.
        constant: the number that it is, None where it varies.
    """

    kind: Op | str
    args: tuple[Expr, ...]
    value: str | int | float
    graph: Graph
    index: int
    constant: float | None

    @property
    def opposite(self) -> Expr | None:
        """-x if that is simpler than x: if x is a negation or a negative constant."""
        if self.constant is not None and self.constant < 0:
            return self.graph.const(-self.constant)
        return self.args[0] if self.kind is Op.NEG else None

    __add__ = _binary(Op.ADD)
    __sub__ = _binary(Op.SUB)
    __rsub__ = _reflected(Op.SUB)
    __mul__ = _binary(Op.MUL)
    __rmul__ = _reflected(Op.MUL)
    __truediv__ = _binary(Op.DIV)
    __rtruediv__ = _reflected(Op.DIV)
    __lt__ = _binary(Op.LT)
    __le__ = _binary(Op.LE)

    def __neg__(self) -> Expr:
        return apply(Op.NEG, self)


def apply(op: Op, *operands: Expr | float, value: str = "") -> Expr:
    """The expression ``op(*operands)``, or an equal, simpler one."""
    graph = next(x.graph for x in operands if isinstance(x, Expr))
    args = tuple([x if isinstance(x, Expr) else graph.const(x) for x in operands])
    rewrite = REWRITES.get(op)
    simpler = None if rewrite is None else rewrite(*args)
    return graph.intern(op, args, value) if simpler is None else simpler


def equal(x: Expr, y: Expr | float) -> Expr:
    """x == y, as 1 or 0."""
    return apply(Op.EQ, x, y)


def where(condition: Expr, x: Expr | float, y: Expr | float) -> Expr:
    """x if the condition is not 0, else y."""
    return apply(Op.WHERE, condition, x, y)


@dataclass(eq=False)
class Graph:
    """Expressions of one loss.

    Args:
        params: values of the parameters, for rows in fp32 and fields that are not wider.
        limits: parameters that hold the largest finite number of an expression's dtype, by the wide inputs of that
            expression; see ``Operand.wide``.
        demands: what the dtypes of a batch's fields must be: a kind of ``DEMANDS``, names of fields, and for what.
    """

    params: list[float] = field(default_factory=list)
    limits: dict[frozenset[str], Expr] = field(default_factory=dict)
    demands: dict[tuple[str, tuple[str, ...], str], None] = field(default_factory=dict)
    _known: dict[tuple[Op | str, tuple[Expr, ...], str | int | float], Expr] = field(default_factory=dict)
    _integers: dict[int, Expr] = field(default_factory=dict)

    def intern(self, kind: Op | str, args: tuple[Expr, ...] = (), value: str | int | float = "") -> Expr:
        """The expression of this kind; it is created if it does not exist yet."""
        key = (kind, args, value)
        known = self._known.get(key)
        if known is None:
            constant = float(value) if kind == "const" else None
            known = self._known[key] = Expr(kind, args, value, self, len(self._known), constant)
        return known

    def input(self, name: str) -> Expr:
        return self.intern("input", value=name)

    def const(self, value: float) -> Expr:
        """A number of the program's structure, from the rules of calculus. Simplification may remove it."""
        return self.intern("const", value=float(value))

    def param(self, value: float) -> Expr:
        """A number of the objective: a run-time parameter, so that a new value needs no new kernel.

        Equal integers share one, since they are literals of the code as a rule. Equal floats do not: two coefficients
        that happen to be equal would make another program than two that differ.
        """
        if isinstance(value, int) and value in self._integers:
            return self._integers[value]
        self.params.append(float(value))
        made = self.intern("param", value=len(self.params) - 1)
        if isinstance(value, int):
            self._integers[value] = made
        return made

    def largest(self, wide: frozenset[str]) -> Expr:
        """The largest finite number of the dtype of an expression. A parameter, as the program does not depend on the
        dtypes of rows and fields."""
        if wide not in self.limits:
            self.params.append(LARGEST_FP32)
            self.limits[wide] = self.intern("param", value=len(self.params) - 1)
        return self.limits[wide]

    def detach(self, x: Expr) -> Expr:
        return self.intern("detach", (x,))


def _simpler_sum(x: Expr, y: Expr) -> Expr | None:
    if x.constant == 0:
        return y
    if y.constant == 0:
        return x
    if y.opposite is not None:
        return x - y.opposite
    return None if x.opposite is None else y - x.opposite


def _simpler_difference(x: Expr, y: Expr) -> Expr | None:
    if y.constant == 0:
        return x
    if x.constant == 0:
        return -y
    return None if y.opposite is None else x + y.opposite


def _simpler_product(x: Expr, y: Expr) -> Expr | None:
    for one, other in ((x, y), (y, x)):
        if one.constant == 0:
            return one
        if one.constant == 1:
            return other
        if one.opposite is not None:
            return -(one.opposite * other)
    return y * x if x.index > y.index else None


def _simpler_quotient(x: Expr, y: Expr) -> Expr | None:
    if x.constant == 0 or y.constant == 1:
        return x
    return None if x.opposite is None else -(x.opposite / y)


def _simpler_negation(x: Expr) -> Expr | None:
    if x.constant is not None:
        return x.graph.const(-x.constant)
    if x.kind is Op.SUB:
        return x.args[1] - x.args[0]
    return x.opposite


def _simpler_choice(condition: Expr, x: Expr, y: Expr) -> Expr | None:
    if x is y:
        return x
    known = condition.constant
    return None if known is None else x if known else y


REWRITES: dict[Op, Callable[..., Expr | None]] = {
    Op.ADD: _simpler_sum,
    Op.SUB: _simpler_difference,
    Op.MUL: _simpler_product,
    Op.DIV: _simpler_quotient,
    Op.NEG: _simpler_negation,
    Op.WHERE: _simpler_choice,
}
"""Exact rewrites: the identities of 0 and 1, and moving signs outwards. None if no rewrite applies."""


def ancestors(*of: Expr) -> list[Expr]:
    """Every expression that ``of`` depends on, arguments before values."""
    seen: set[Expr] = set()
    stack = list(of)
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            stack.extend(x.args)
    return sorted(seen, key=attrgetter("index"))
