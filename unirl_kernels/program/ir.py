"""The scalar program that a one-pass kernel runs once per row.

All terms of token scope of a loss become one short straight-line program over scalars. It reads the row's statistics
and the batch's fields, and returns the row's weighted loss and its derivatives with respect to the three statistics:

    (logp, entropy, lse; fields; params)  ->  (loss, d_logp, d_entropy, d_lse)

The weights of the terms are fields too. The gradient coefficient of the unified paradigm is GC = -d_logp of an
unweighted term (Shao et al. 2024, arXiv:2402.03300v3, eq. 1).

Registers are numbered: the three ``STATISTICS``, then the fields, then the parameters, then one register per
instruction. Kernels do not know the names of fields, only their numbers. ``csrc/program.h`` interprets the same
program; ``backends/triton`` prints it as a device function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

STATISTICS = ("logp", "entropy", "lse")
OUTPUTS = ("loss", "d_logp", "d_entropy", "d_lse")
ZERO = -1
"""Register number of an output that is identically zero, and of an unused operand."""

MAX_FIELDS = 24
MAX_PARAMS = 96
MAX_INSTRUCTIONS = 512
"""Limits of the native interpreters: twice what the largest published sum of losses needs."""

HEADER = 3 + len(OUTPUTS)
WORD = 4
"""Numbers of an instruction in the text: the operation and three operands."""


class Op(IntEnum):
    """Operations of a program, each with its number of operands and its definition on tensors.

    The order is the encoding, as in ``csrc/program.h``. Truth values are the numbers 1 and 0.
    """

    arity: int
    on_tensors: Callable[..., Tensor]

    def __new__(cls, arity: int, on_tensors: Callable[..., Tensor]) -> Op:
        op = int.__new__(cls, len(cls.__members__))
        op._value_ = int(op)
        op.arity = arity
        op.on_tensors = on_tensors
        return op

    ADD = 2, torch.add
    SUB = 2, torch.sub
    MUL = 2, torch.mul
    DIV = 2, torch.div
    NEG = 1, torch.neg
    ABS = 1, torch.abs
    SIGN = 1, torch.sign
    MINIMUM = 2, torch.minimum
    MAXIMUM = 2, torch.maximum
    CLAMP = 3, torch.clamp
    EXP = 1, torch.exp
    EXPM1 = 1, torch.expm1
    LOG = 1, torch.log
    LOG1P = 1, torch.log1p
    SQRT = 1, torch.sqrt
    TANH = 1, torch.tanh
    SIGMOID = 1, torch.sigmoid
    LOGSIGMOID = 1, logsigmoid
    LT = 2, lambda x, y: (x < y).to(x.dtype)
    LE = 2, lambda x, y: (x <= y).to(x.dtype)
    EQ = 2, lambda x, y: (x == y).to(x.dtype)
    WHERE = 3, lambda c, x, y: torch.where(c != 0, x, y)
    POW = 2, torch.pow


@dataclass(frozen=True)
class Instruction:
    """``register <- op(*args)``; the register is the instruction's position."""

    op: Op
    args: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A straight-line scalar program.

    Args:
        n_fields: number of fields that it reads.
        n_params: number of run-time parameters (the objectives' scalars, then constants of the derivation).
        instructions: executed in order.
        outputs: registers of ``OUTPUTS``; ``ZERO`` if an output is identically zero.
    """

    n_fields: int
    n_params: int
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, int, int, int]

    @property
    def has_entropy_gradient(self) -> bool:
        return self.outputs[OUTPUTS.index("d_entropy")] != ZERO

    @property
    def text(self) -> str:
        """The program in the form that operators and kernels take: decimal numbers separated by spaces.

        ``n_fields n_params n_instructions``, the four outputs, then ``op a b c`` for each instruction. It is text
        because torch.compile would make a variable of every integer in a list.
        """
        numbers = [self.n_fields, self.n_params, len(self.instructions), *self.outputs]
        for i in self.instructions:
            numbers += [int(i.op), *i.args, *[ZERO] * (WORD - 1 - len(i.args))]
        return " ".join(map(str, numbers))

    @classmethod
    def parse(cls, text: str) -> Program:
        """Inverse of ``text``.

        Raises:
            ValueError: when the text is not that of a program.
        """
        numbers = [int(word) for word in text.split()]
        if len(numbers) < HEADER or len(numbers) != HEADER + WORD * numbers[2]:
            raise ValueError(f"program must hold {HEADER} + {WORD} n numbers, got {len(numbers)}")
        instructions = []
        for at in range(HEADER, len(numbers), WORD):
            op = Op(numbers[at])  # type: ignore[call-arg]  # by its number
            instructions.append(Instruction(op, tuple(numbers[at + 1 : at + 1 + op.arity])))
        loss, d_logp, d_entropy, d_lse = numbers[3:HEADER]
        return cls(numbers[0], numbers[1], tuple(instructions), (loss, d_logp, d_entropy, d_lse))


@cache
def parsed(text: str) -> Program:
    """``Program.parse``, once per distinct program."""
    return Program.parse(text)


def evaluate(program: Program, stats: Sequence[Tensor], fields: Tensor, params: Tensor) -> tuple[Tensor, ...]:
    """Run ``program`` on tensors. The eager backend uses it, and it defines what programs compute.

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
        registers.append(instruction.op.on_tensors(*operands))
    zero = torch.zeros_like(like)
    return tuple(zero if r == ZERO else registers[r] for r in program.outputs)
