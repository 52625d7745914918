"""Prints the expressions of an objective as formulas."""

from __future__ import annotations

from collections import Counter

from unirl_kernels.program.graph import Expr, ancestors
from unirl_kernels.program.ir import Op

INFIX: dict[Op | str, tuple[str, int]] = {
    Op.ADD: ("+", 2),
    Op.SUB: ("-", 2),
    Op.MUL: ("*", 3),
    Op.DIV: ("/", 3),
    Op.LT: ("<", 1),
    Op.LE: ("<=", 1),
    Op.EQ: ("==", 1),
}
PREFIX_PRECEDENCE = 4
CALL = 9


def formula(*outputs: tuple[str, Expr]) -> str:
    """Lines ``name = expression`` for named outputs, preceded by the subexpressions that occur more than once."""
    order = ancestors(*(x for _, x in outputs))
    uses = Counter(a for x in order for a in x.args)
    names: dict[Expr, str] = {}
    lines = []
    for x in order:
        if uses[x] > 1 and isinstance(x.kind, Op):
            text = _write(x, names)[0]
            names[x] = f"v{len(names)}"
            lines.append(f"{names[x]} = {text}")
    lines += [f"{name} = {_write(x, names)[0]}" for name, x in outputs]
    return "\n".join(lines)


def _write(x: Expr, names: dict[Expr, str]) -> tuple[str, int]:
    """Text of an expression, and its operator precedence."""
    if x in names:
        return names[x], CALL
    if x.kind == "input":
        return str(x.value), CALL
    if x.kind in ("const", "param"):
        value = x.graph.params[int(x.value)] if x.kind == "param" else float(x.value)
        return f"{value:.6g}", CALL if value >= 0 else PREFIX_PRECEDENCE - 1
    parts = [_write(a, names) for a in x.args]
    if x.kind in INFIX:
        sign, precedence = INFIX[x.kind]
        left = _bracket(parts[0], precedence)
        right = _bracket(parts[1], precedence + (x.kind in (Op.SUB, Op.DIV)))
        return f"{left} {sign} {right}", precedence
    if x.kind is Op.NEG:
        return f"-{_bracket(parts[0], PREFIX_PRECEDENCE)}", PREFIX_PRECEDENCE
    name = x.kind.name.lower() if isinstance(x.kind, Op) else "stop_gradient"
    return f"{name}({', '.join(text for text, _ in parts)})", CALL


def _bracket(part: tuple[str, int], at_least: int) -> str:
    text, precedence = part
    return text if precedence >= at_least else f"({text})"
