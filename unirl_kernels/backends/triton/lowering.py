"""Translates a scalar program to a Triton device function that a kernel can call."""

from __future__ import annotations

import hashlib
import linecache
from functools import cache
from typing import Any

from unirl_kernels.program import STATISTICS, ZERO, Op, Program, parsed

OPERATORS = {
    Op.ADD: "{} + {}",
    Op.SUB: "{} - {}",
    Op.MUL: "{} * {}",
    Op.DIV: "divide({}, {})",
    Op.NEG: "-{}",
    Op.ABS: "tl.abs({})",
    Op.LT: "({} < {}).to(logp.dtype)",
    Op.LE: "({} <= {}).to(logp.dtype)",
    Op.EQ: "({} == {}).to(logp.dtype)",
    Op.WHERE: "tl.where({} != 0, {}, {})",
    Op.POW: "power({}, {})",
}
"""Triton text of instructions that are operators. All others are functions of the same name in ``scalar_math``."""


def source(program: Program) -> str:
    """Print a program as the source of a ``triton.jit`` function.

    Args:
        program: the scalar program of an objective.

    Returns:
        Source of ``objective(params, logp, entropy, lse, f0, f1, ...)``, which returns loss, d_logp, d_entropy and
        d_lse. ``params`` points to the parameters, float64; f0, f1, ... are the program's fields.
    """
    inputs = [*STATISTICS, *(f"f{i}" for i in range(program.n_fields))]
    parameters = [f"p{i}" for i in range(program.n_params)]
    names = [*inputs, *parameters]
    lines = ["@triton.jit", f"def objective(params, {', '.join(inputs)}):"]
    lines += [f"    {name} = tl.load(params + {i}).to(logp.dtype)" for i, name in enumerate(parameters)]
    for i, instruction in enumerate(program.instructions):
        names.append(f"v{i}")
        lines.append(f"    v{i} = {_expression(instruction.op, [names[r] for r in instruction.args])}")
    if ZERO in program.outputs:
        lines.append("    zero = tl.full((), 0, logp.dtype)")
    outputs = ("zero" if r == ZERO else names[r] for r in program.outputs)
    lines.append(f"    return {', '.join(outputs)}")
    return "\n".join(lines) + "\n"


def _expression(op: Op, args: list[str]) -> str:
    return OPERATORS[op].format(*args) if op in OPERATORS else f"{op.name.lower()}({', '.join(args)})"


@cache
def device_function(text: str) -> Any:
    """The ``triton.jit`` function of a program's text, one per distinct program.

    Its name is derived from its source, so that a later process finds it in Triton's compilation cache on disk.
    """
    from unirl_kernels.backends.triton import scalar_math

    code = source(parsed(text))
    # The name includes the module, since another copy of this package has its own functions.
    name = f"{__name__}.objective_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    filename = f"<{name}>"
    # Triton reads a function's source through inspect, which finds sources without a file in linecache.
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    namespace = {name: value for name, value in vars(scalar_math).items() if not name.startswith("_")}
    namespace["__name__"] = name
    exec(compile(code, filename, "exec"), namespace)
    return namespace["objective"]
