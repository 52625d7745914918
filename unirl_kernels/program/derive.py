"""Forward-mode derivatives of expressions, and their layout as a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unirl_kernels.program import kinks
from unirl_kernels.program.graph import Expr, Graph, ancestors, apply, equal, where
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
from unirl_kernels.program.kinks import Rule


def _along(slope: Callable[[Expr, Expr], Expr]) -> Rule:
    """The rule of a function of one argument: slope(x, y) dx, with the function's value y."""
    return lambda y, x, dx: _times(slope(x[0], y), dx[0])


def _steep(slope: Callable[[Expr, Expr], Expr]) -> Rule:
    """``_along`` of a function whose slope can be infinite."""
    return lambda y, x, dx: _selected(dx[0], _times(slope(x[0], y), dx[0]))


def _times(factor: Expr, dx: Expr) -> Expr:
    """factor dx; 0 if ``where``, ``clamp`` or a similar operation made dx 0, even if the factor overflows or is NaN."""
    product = factor * dx
    chosen = isinstance(factor.kind, Op) and any(x.kind is Op.WHERE for x in ancestors(dx))
    return _selected(dx, product) if chosen else product


def _selected(dx: Expr, product: Expr) -> Expr:
    """``product`` if dx is not 0, else 0. An infinite slope times a derivative that ``where``, ``clamp`` or ``relu``
    made 0 would be NaN. PyTorch's backward selects instead, and gives 0. If dx is 0 for another reason, as of x * x at
    0, PyTorch gives NaN where the slope is infinite; this gives 0."""
    return product if _is_number(dx) else where(dx, product, 0)


def _is_number(x: Expr) -> bool:
    """Whether x is the same for all tokens."""
    return x.kind in ("const", "param")


def _product(y: Expr, x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
    return _times(x[1], dx[0]) + _times(x[0], dx[1])


def _quotient(y: Expr, x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
    """Of x / c for a number c: dx / c. Else (dx_0 - y dx_1) / x_1."""
    if _is_number(x[1]):
        return dx[0] / x[1]
    change = dx[0] - _selected(dx[1], y * dx[1])
    quotient = change / x[1]
    return quotient if all(map(_is_number, dx)) else _selected(change, quotient)


def _power(y: Expr, x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
    """Of x ** c with a constant exponent: c x ** (c - 1), and 0 if c is 0, where x ** -1 may be infinite."""
    slope = x[1] * apply(Op.POW, x[0], x[1] - 1)
    return where(x[1], _selected(dx[0], slope * dx[0]), 0)


def _step(y: Expr, x: tuple[Expr, ...], dx: tuple[Expr, ...]) -> Expr:
    return y.graph.const(0)


RULES: dict[Op, Rule] = {
    Op.ADD: lambda y, x, dx: dx[0] + dx[1],
    Op.SUB: lambda y, x, dx: dx[0] - dx[1],
    Op.MUL: _product,
    Op.DIV: _quotient,
    Op.NEG: lambda y, x, dx: -dx[0],
    Op.ABS: _along(lambda x, y: apply(Op.SIGN, x) + kinks.KINKS.abs * equal(x, 0)),
    Op.SIGN: _step,
    Op.MINIMUM: kinks.extremum(lambda x, y: x <= y),
    Op.MAXIMUM: kinks.extremum(lambda x, y: y <= x),
    Op.CLAMP: kinks.clamp,
    Op.EXP: _along(lambda x, y: y),
    Op.EXPM1: _along(lambda x, y: apply(Op.EXP, x)),
    Op.LOG: _steep(lambda x, y: 1 / x),
    Op.LOG1P: _steep(lambda x, y: 1 / (x + 1)),
    Op.SQRT: _steep(lambda x, y: 0.5 / y),
    Op.TANH: _along(lambda x, y: 1 - y * y),
    Op.SIGMOID: _along(lambda x, y: y * (1 - y)),
    Op.LOGSIGMOID: _along(lambda x, y: apply(Op.SIGMOID, -x)),
    Op.LT: _step,
    Op.LE: _step,
    Op.EQ: _step,
    Op.WHERE: lambda y, x, dx: where(x[0], dx[1], dx[2]),
    Op.POW: _power,
}
"""The derivative of each operation. At kinks it is that of PyTorch."""


def derivative(of: Expr, wrt: str) -> Expr:
    """The derivative of ``of`` with respect to the input named ``wrt`` (forward mode, dual numbers)."""
    zero = of.graph.const(0)
    tangent: dict[Expr, Expr] = {}
    for x in ancestors(of):
        inner = tuple([tangent[a] for a in x.args])
        tangent[x] = zero
        if x.kind == "input" and x.value == wrt:
            tangent[x] = of.graph.const(1)
        elif isinstance(x.kind, Op) and any(d is not zero for d in inner):
            tangent[x] = RULES[x.kind](x, x.args, inner)
    return tangent[of]


def assemble(g: Graph, terms: Sequence[Expr], weights: Sequence[str]) -> tuple[Program, tuple[str, ...], list[float]]:
    """Differentiate the weighted sum of terms and lay the expressions out as a program.

    Args:
        g: the expressions.
        terms: the losses of a token, one for each term.
        weights: name of the field that holds each term's weight.

    Returns:
        The program, the names of its fields in their order, and the values of its parameters: the objectives' own,
        then the derivation's constants.

    Raises:
        ValueError: when the program is longer than kernels take.
    """
    at_weight = [g.input(name) for name in weights]
    slopes = [_visible([derivative(x, name) for name in STATISTICS]) for x in terms]
    outputs = [_weighted_sum(of_terms, at_weight) for of_terms in (terms, *zip(*slopes, strict=True))]
    used = ancestors(*(x for x in outputs if x.constant != 0))
    constants = sorted({float(x.value) for x in used if x.kind == "const"})
    fields = tuple(str(x.value) for x in used if x.kind == "input" and x.value not in STATISTICS)
    inputs: list[tuple[str, str | int | float]] = [
        *(("input", name) for name in (*STATISTICS, *fields)),
        *(("param", k) for k in range(len(g.params))),
        *(("const", value) for value in constants),
    ]
    numbered = {of_input: k for k, of_input in enumerate(inputs)}
    register: dict[Expr, int] = {}
    instructions: list[Instruction] = []
    for x in used:
        if isinstance(x.kind, Op):
            register[x] = len(inputs) + len(instructions)
            instructions.append(Instruction(x.kind, tuple(register[a] for a in x.args)))
        else:
            register[x] = register[x.args[0]] if x.kind == "detach" else numbered[x.kind, x.value]
    params = [*g.params, *constants]
    _check_size(len(instructions), len(params), len(fields))
    loss, d_logp, d_entropy, d_lse = (ZERO if x.constant == 0 else register[x] for x in outputs)
    return Program(len(fields), len(params), tuple(instructions), (loss, d_logp, d_entropy, d_lse)), fields, params


def _weighted_sum(values: Sequence[Expr], weights: Sequence[Expr]) -> Expr:
    """The sum of weight * value; exactly 0 if the weight is 0, for any value (NaN, inf)."""
    total = weights[0].graph.const(0)
    for x, weight in zip(values, weights, strict=True):
        if x.constant != 0:
            total = total + where(weight, weight * x, 0)
    return total


def _visible(slopes: list[Expr]) -> list[Expr]:
    """Derivatives of a term; NaN in a row with NaN logits. Without this, the derivative of a clamp would be 0 there and
    hide the NaN. PyTorch's backward of log_softmax multiplies even 0 by the row's NaN."""
    for k, slope in enumerate(slopes):
        if slope.constant != 0:
            lse = slope.graph.input("lse")
            return [*slopes[:k], slope + (lse - lse), *slopes[k + 1 :]]
    return slopes


def _check_size(instructions: int, params: int, fields: int) -> None:
    if instructions > MAX_INSTRUCTIONS or params > MAX_PARAMS or fields > MAX_FIELDS:
        raise ValueError(
            f"{instructions} operations, {params} scalars and {fields} fields with its derivative; "
            f"one-pass kernels take {MAX_INSTRUCTIONS}, {MAX_PARAMS} and {MAX_FIELDS}"
        )
