"""Runs a program on tensors: the meaning of every instruction, and what the eager backend executes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.program.ir import ZERO, Op, Program

UNLIKE_TORCH: dict[Op, Callable[..., Tensor]] = {
    Op.LOGSIGMOID: logsigmoid,
    Op.LT: lambda x, y: (x < y).to(x.dtype),
    Op.LE: lambda x, y: (x <= y).to(x.dtype),
    Op.EQ: lambda x, y: (x == y).to(x.dtype),
    Op.WHERE: lambda c, x, y: torch.where(c != 0, x, y),
}
"""Instructions that are not the torch function of their name: truth values are numbers here."""

INSTRUCTIONS: dict[Op, Callable[..., Tensor]] = {
    op: UNLIKE_TORCH[op] if op in UNLIKE_TORCH else getattr(torch, op.name.lower()) for op in Op
}


def evaluate(program: Program, stats: Sequence[Tensor], fields: Tensor, params: Tensor) -> tuple[Tensor, ...]:
    """Run ``program`` on every row.

    Args:
        program: what to compute.
        stats: logp, entropy, lse; tensors of one shape and dtype.
        fields: [n_fields, *shape], of the statistics' dtype.
        params: [n_params] float64, on the statistics' device.

    Returns:
        loss, d_logp, d_entropy, d_lse: the shape and dtype of the statistics.
    """
    like = stats[0]
    registers = [*stats, *fields.unbind(), *(p.to(like.dtype).expand_as(like) for p in params.unbind())]
    for instruction in program.instructions:
        operands = [registers[r] for r in instruction.args]
        registers.append(INSTRUCTIONS[instruction.op](*operands))
    zero = torch.zeros_like(like)
    return tuple(zero if r == ZERO else registers[r] for r in program.outputs)
