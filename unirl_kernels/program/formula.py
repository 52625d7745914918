"""Writes the expressions of an objective for people."""

from __future__ import annotations

from unirl_kernels.program.graph import Graph, Node, ancestors
from unirl_kernels.program.ir import Op

INFIX = {
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


def formula(graph: Graph, *outputs: tuple[str, int]) -> str:
    """Lines ``name = expression`` for named outputs, preceded by the subexpressions that occur more than once.

    Args:
        graph: the expressions.
        outputs: (name, node) pairs.
    """
    order = ancestors(graph, *(x for _, x in outputs))
    uses = dict.fromkeys(order, 0)
    for x in order:
        for a in graph.nodes[x].args:
            uses[a] += 1
    names: dict[int, str] = {}
    lines = []
    for x in order:
        if uses[x] > 1 and isinstance(graph.nodes[x].kind, Op):
            text = _write(graph, x, names)[0]
            names[x] = f"v{len(names)}"
            lines.append(f"{names[x]} = {text}")
    lines += [f"{name} = {_write(graph, x, names)[0]}" for name, x in outputs]
    return "\n".join(lines)


def _write(g: Graph, x: int, names: dict[int, str]) -> tuple[str, int]:
    """Text of a node and how tightly it binds."""
    if x in names:
        return names[x], CALL
    node = g.nodes[x]
    if node.kind == "detach":
        return f"stop_gradient({_write(g, node.args[0], names)[0]})", CALL
    if not isinstance(node.kind, Op):
        return _leaf(g, node)
    parts = [_write(g, a, names) for a in node.args]
    if node.kind in INFIX:
        sign, precedence = INFIX[node.kind]
        left = _bracket(parts[0], precedence)
        right = _bracket(parts[1], precedence + (node.kind in (Op.SUB, Op.DIV)))
        return f"{left} {sign} {right}", precedence
    if node.kind is Op.NEG:
        return f"-{_bracket(parts[0], PREFIX_PRECEDENCE)}", PREFIX_PRECEDENCE
    return f"{node.kind.name.lower()}({', '.join(text for text, _ in parts)})", CALL


def _bracket(part: tuple[str, int], at_least: int) -> str:
    text, precedence = part
    return text if precedence >= at_least else f"({text})"


def _leaf(g: Graph, node: Node) -> tuple[str, int]:
    if node.kind == "input":
        return str(node.value), CALL
    value = g.params[int(node.value)] if node.kind == "param" else float(node.value)
    return f"{value:.6g}", CALL if value >= 0 else PREFIX_PRECEDENCE - 1
