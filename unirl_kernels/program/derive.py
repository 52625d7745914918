"""Forward-mode derivatives of expressions, and their layout as a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from unirl_kernels.program import kinks
from unirl_kernels.program.graph import Graph, ancestors
from unirl_kernels.program.ir import (
    MAX_FIELDS,
    MAX_INSTRUCTIONS,
    MAX_PARAMS,
    STATISTICS,
    ZERO,
    Instruction,
    Op,
    Program,
)

Rule = Callable[[Graph, int, tuple[int, ...], tuple[int, ...]], int]


def _along(slope: Callable[[Graph, int, int], int]) -> Rule:
    """Rule of a function of one argument: slope(x, y) dx, where y is the function's value."""
    return lambda g, y, x, dx: _times(g, slope(g, x[0], y), dx[0])


def _times(g: Graph, factor: int, dx: int) -> int:
    """factor dx; 0 where ``where``, ``clamp`` or the like made dx 0, even if a computed factor overflowed or is NaN."""
    product = g.op(Op.MUL, factor, dx)
    computed = isinstance(g.nodes[factor].kind, Op)
    chosen = computed and any(g.nodes[x].kind is Op.WHERE for x in ancestors(g, dx))
    return _selected(g, dx, product) if chosen else product


def _selected(g: Graph, dx: int, product: int) -> int:
    """``product`` where dx is not 0, else 0: an infinite slope times a derivative that ``where``, ``clamp`` or ``relu``
    made 0 would be NaN, where PyTorch's backward pass selects and gives 0."""
    if g.nodes[dx].kind in ("const", "param"):
        return product
    return g.op(Op.WHERE, dx, product, g.const(0))


def _steep(slope: Callable[[Graph, int, int], int]) -> Rule:
    """``_along`` of a function whose slope can be infinite."""
    along = _along(slope)
    return lambda g, y, x, dx: _selected(g, dx[0], along(g, y, x, dx))


def _one_minus(g: Graph, x: int) -> int:
    return g.op(Op.SUB, g.const(1), x)


def _power(g: Graph, y: int, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
    """Rule of x ** c with a constant exponent: c x ** (c - 1)."""
    slope = g.op(Op.MUL, x[1], g.op(Op.POW, x[0], g.op(Op.SUB, x[1], g.const(1))))
    return _selected(g, dx[0], g.op(Op.MUL, slope, dx[0]))


def _quotient(g: Graph, y: int, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
    if g.nodes[x[1]].kind in ("const", "param"):
        return g.op(Op.DIV, dx[0], x[1])
    change = g.op(Op.SUB, dx[0], _selected(g, dx[1], g.op(Op.MUL, y, dx[1])))
    quotient = g.op(Op.DIV, change, x[1])
    return quotient if all(g.nodes[d].kind in ("const", "param") for d in dx) else _selected(g, change, quotient)


def _product(g: Graph, y: int, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
    return g.op(Op.ADD, _times(g, x[1], dx[0]), _times(g, x[0], dx[1]))


def _step(g: Graph, y: int, x: tuple[int, ...], dx: tuple[int, ...]) -> int:
    return g.const(0)


def _sigmoid_slope(g: Graph, x: int, y: int) -> int:
    return g.op(Op.MUL, y, _one_minus(g, y))


RULES: dict[Op, Rule] = {
    Op.ADD: lambda g, y, x, dx: g.op(Op.ADD, *dx),
    Op.SUB: lambda g, y, x, dx: g.op(Op.SUB, *dx),
    Op.MUL: _product,
    Op.DIV: _quotient,
    Op.NEG: lambda g, y, x, dx: g.op(Op.NEG, *dx),
    Op.ABS: _along(kinks.abs_slope),
    Op.SIGN: _step,
    Op.MINIMUM: kinks.extremum((0, 1)),
    Op.MAXIMUM: kinks.extremum((1, 0)),
    Op.CLAMP: kinks.clamp,
    Op.EXP: _along(lambda g, x, y: y),
    Op.EXPM1: _along(lambda g, x, y: g.op(Op.EXP, x)),
    Op.LOG: _steep(lambda g, x, y: g.op(Op.DIV, g.const(1), x)),
    Op.LOG1P: _steep(lambda g, x, y: g.op(Op.DIV, g.const(1), g.op(Op.ADD, g.const(1), x))),
    Op.SQRT: _steep(lambda g, x, y: g.op(Op.DIV, g.const(0.5), y)),
    Op.TANH: _along(lambda g, x, y: _one_minus(g, g.op(Op.MUL, y, y))),
    Op.SIGMOID: _along(_sigmoid_slope),
    Op.LOGSIGMOID: _along(lambda g, x, y: g.op(Op.SIGMOID, g.op(Op.NEG, x))),
    Op.LT: _step,
    Op.LE: _step,
    Op.EQ: _step,
    Op.WHERE: lambda g, y, x, dx: g.op(Op.WHERE, x[0], dx[1], dx[2]),
    Op.POW: _power,
}
"""Derivative of each operation: rule(graph, value, arguments, their derivatives). PyTorch's conventions at kinks."""


def derivative(g: Graph, of: int, wrt: str) -> int:
    """Node of the derivative of ``of`` with respect to the input named ``wrt`` (forward mode, dual numbers)."""
    zero = g.const(0)
    tangent: dict[int, int] = {}
    for x in ancestors(g, of):
        node = g.nodes[x]
        if node.kind == "input":
            tangent[x] = g.const(1) if node.value == wrt else zero
        elif isinstance(node.kind, Op):
            inner = tuple(tangent[a] for a in node.args)
            flat = all(d == zero for d in inner)
            tangent[x] = zero if flat else RULES[node.kind](g, x, node.args, inner)
        else:
            tangent[x] = zero
    return tangent[of]


def weighted(g: Graph, term: int, weight: int) -> int:
    """Node of weight * term; exactly 0 where the weight is 0, whatever the term is there (NaN, inf)."""
    return g.op(Op.WHERE, weight, g.op(Op.MUL, weight, term), g.const(0))


def assemble(g: Graph, terms: Sequence[int], weights: Sequence[str]) -> tuple[Program, tuple[str, ...], list[float]]:
    """Differentiate the weighted sum of terms and lay the expressions out as a program.

    Args:
        g: the expressions.
        terms: nodes of the losses of a token, one for each term.
        weights: name of the field that holds each term's weight.

    Returns:
        The program, the names of its fields in their order, and the values of its parameters: the objectives' own,
        then the derivation's constants.

    Raises:
        ValueError: when the program is longer than kernels take.
    """
    at_weight = [g.input(name) for name in weights]

    def total(nodes: Sequence[int]) -> int:
        sum_of = g.const(0)
        for node, weight in zip(nodes, at_weight, strict=True):
            if g.constant_value(node) != 0:
                sum_of = g.op(Op.ADD, sum_of, weighted(g, node, weight))
        return sum_of

    slopes = [_visible(g, [derivative(g, x, name) for name in STATISTICS]) for x in terms]
    outputs = [total(terms), *(total(of_terms) for of_terms in zip(*slopes, strict=True))]
    outputs = [ZERO if g.constant_value(x) == 0 else x for x in outputs]
    order = ancestors(g, *outputs)
    constants = sorted({float(g.nodes[x].value) for x in order if g.nodes[x].kind == "const"})
    inputs = [str(g.nodes[x].value) for x in order if g.nodes[x].kind == "input"]
    fields = tuple(name for name in inputs if name not in STATISTICS)
    params = [*g.params, *constants]
    first = {"input": 0, "param": len(STATISTICS) + len(fields)}
    first["const"] = first["param"] + len(g.params)
    numbers: dict[str, list[Any]] = {"input": [*STATISTICS, *fields], "const": constants}
    register: dict[int, int] = {ZERO: ZERO}
    instructions: list[Instruction] = []
    for x in order:
        node = g.nodes[x]
        if isinstance(node.kind, Op):
            register[x] = first["const"] + len(constants) + len(instructions)
            instructions.append(Instruction(node.kind, tuple(register[a] for a in node.args)))
        elif node.kind == "param":
            register[x] = first["param"] + int(node.value)
        elif node.kind == "detach":
            register[x] = register[node.args[0]]
        else:
            register[x] = first[node.kind] + numbers[node.kind].index(node.value)
    _check_size(len(instructions), len(params), len(fields))
    at = [register[x] for x in outputs]
    return Program(len(fields), len(params), tuple(instructions), (at[0], at[1], at[2], at[3])), fields, params


def _visible(g: Graph, slopes: list[int]) -> list[int]:
    """Derivatives of a term, NaN in a row with NaN logits: a clamp's would be 0 there, and hide it. PyTorch's backward
    of log_softmax multiplies even 0 by the row's NaN."""
    lse = g.input("lse")
    for k, slope in enumerate(slopes):
        if g.constant_value(slope) != 0:
            return [*slopes[:k], g.op(Op.ADD, slope, g.op(Op.SUB, lse, lse)), *slopes[k + 1 :]]
    return slopes


def _check_size(instructions: int, params: int, fields: int) -> None:
    if instructions > MAX_INSTRUCTIONS or params > MAX_PARAMS or fields > MAX_FIELDS:
        raise ValueError(
            f"{instructions} operations, {params} scalars and {fields} fields with its derivative; "
            f"one-pass kernels take {MAX_INSTRUCTIONS}, {MAX_PARAMS} and {MAX_FIELDS}"
        )
