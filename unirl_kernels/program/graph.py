"""Scalar expressions: a hash-consed graph that simplifies itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from unirl_kernels.program.ir import ZERO, Op


@dataclass(frozen=True)
class Node:
    """One expression. ``kind`` is an ``Op``, or ``input`` (a name), ``param`` (an index), ``const`` (a number),
    ``detach`` (the value of its argument, with derivative zero). ``value`` of a clamp says what its bounds are."""

    kind: Op | str
    args: tuple[int, ...] = ()
    value: str | int | float = 0


LARGEST_FP32 = (2 - 2.0**-23) * 2.0**127


@dataclass
class Graph:
    """Nodes in topological order; equal expressions share a node. ``at_largest`` is the parameter that holds the
    largest finite number of the rows' dtype, if one does."""

    nodes: list[Node] = field(default_factory=list)
    params: list[float] = field(default_factory=list)
    at_largest: int | None = None
    _index: dict[Node, int] = field(default_factory=dict)
    _integers: dict[int, int] = field(default_factory=dict)

    def _intern(self, node: Node) -> int:
        if node not in self._index:
            self._index[node] = len(self.nodes)
            self.nodes.append(node)
        return self._index[node]

    def input(self, name: str) -> int:
        return self._intern(Node("input", value=name))

    def const(self, value: float) -> int:
        """A number that belongs to the structure (from the rules of calculus): simplified away where possible."""
        return self._intern(Node("const", value=float(value)))

    def param(self, value: float) -> int:
        """A number of the objective: a run-time parameter, so that a new value needs no new kernel.

        Equal integers share one, since they are literals of the code as a rule. Equal floats do not: two coefficients
        that happen to be equal would make another program than two that differ.
        """
        if isinstance(value, int) and value in self._integers:
            return self._integers[value]
        self.params.append(float(value))
        node = self._intern(Node("param", value=len(self.params) - 1))
        if isinstance(value, int):
            self._integers[value] = node
        return node

    def largest(self) -> int:
        """The largest finite number of the rows' dtype. A parameter, as the program is the same for fp32 and fp64."""
        if self.at_largest is None:
            self.at_largest = len(self.params)
            self.params.append(LARGEST_FP32)
        return self._intern(Node("param", value=self.at_largest))

    def detach(self, x: int) -> int:
        return self._intern(Node("detach", (x,)))

    def op(self, op: Op, *args: int, value: str = "") -> int:
        simpler = REWRITES[op](self, args) if op in REWRITES else None
        return self._intern(Node(op, args, value)) if simpler is None else simpler

    def constant_value(self, x: int) -> float | None:
        node = self.nodes[x]
        return float(node.value) if node.kind == "const" else None

    def negated(self, x: int) -> int:
        return self.op(Op.NEG, x)

    def opposite(self, x: int) -> int | None:
        """Node of -x where that is simpler than x: x is a negation or a negative constant."""
        node = self.nodes[x]
        if node.kind == "const" and float(node.value) < 0:
            return self.const(-float(node.value))
        return node.args[0] if node.kind is Op.NEG else None


Rewrite = Callable[["Graph", tuple[int, ...]], "int | None"]


def _simpler_sum(g: Graph, args: tuple[int, ...]) -> int | None:
    x, y = args
    if g.constant_value(x) == 0:
        return y
    if g.constant_value(y) == 0:
        return x
    if (opposite := g.opposite(y)) is not None:
        return g.op(Op.SUB, x, opposite)
    if (opposite := g.opposite(x)) is not None:
        return g.op(Op.SUB, y, opposite)
    return None


def _simpler_difference(g: Graph, args: tuple[int, ...]) -> int | None:
    x, y = args
    if g.constant_value(y) == 0:
        return x
    if g.constant_value(x) == 0:
        return g.op(Op.NEG, y)
    opposite = g.opposite(y)
    return None if opposite is None else g.op(Op.ADD, x, opposite)


def _simpler_product(g: Graph, args: tuple[int, ...]) -> int | None:
    for x, y in (args, args[::-1]):
        if g.constant_value(x) == 0:
            return x
        if g.constant_value(x) == 1:
            return y
        if (opposite := g.opposite(x)) is not None:
            return g.op(Op.NEG, g.op(Op.MUL, opposite, y))
    return g.op(Op.MUL, args[1], args[0]) if args[0] > args[1] else None


def _simpler_quotient(g: Graph, args: tuple[int, ...]) -> int | None:
    x, y = args
    if g.constant_value(x) == 0 or g.constant_value(y) == 1:
        return x
    opposite = g.opposite(x)
    return None if opposite is None else g.op(Op.NEG, g.op(Op.DIV, opposite, y))


def _simpler_negation(g: Graph, args: tuple[int, ...]) -> int | None:
    node = g.nodes[args[0]]
    if node.kind == "const":
        return g.const(-float(node.value))
    if node.kind is Op.SUB:
        return g.op(Op.SUB, *reversed(node.args))
    return g.opposite(args[0])


def _simpler_choice(g: Graph, args: tuple[int, ...]) -> int | None:
    condition, x, y = args
    if x == y:
        return x
    known = g.constant_value(condition)
    return None if known is None else x if known else y


REWRITES: dict[Op, Rewrite] = {
    Op.ADD: _simpler_sum,
    Op.SUB: _simpler_difference,
    Op.MUL: _simpler_product,
    Op.DIV: _simpler_quotient,
    Op.NEG: _simpler_negation,
    Op.WHERE: _simpler_choice,
}
"""Exact rewrites: the identities of 0 and 1, and signs moved outwards. None where nothing applies."""


def ancestors(g: Graph, *of: int) -> list[int]:
    """Every node that ``of`` depends on, arguments before values."""
    seen: set[int] = set()
    stack = [x for x in of if x != ZERO]
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            stack.extend(g.nodes[x].args)
    return sorted(seen)
