"""The scalar program: what a one-pass kernel runs once per row.

The terms of token scope of a loss become one short straight-line program over scalars. It reads the row's statistics
and the batch's fields, and returns the row's weighted loss and its derivatives with respect to the three statistics:

    (logp, entropy, lse; fields; params)  ->  (loss, d_logp, d_entropy, d_lse)

The weights of the terms are fields like all others. The gradient coefficient of the unified paradigm is GC = -d_logp
of an unweighted term (Shao et al. 2024, arXiv:2402.03300v3, eq. 1).

Registers are numbered: the three ``STATISTICS``, then the fields, then the parameters, then one register per
instruction. Names of fields stay outside: kernels know numbers only. ``csrc/program.h`` interprets the same text;
``backends/triton`` prints it as a device function.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

STATISTICS = ("logp", "entropy", "lse")
OUTPUTS = ("loss", "d_logp", "d_entropy", "d_lse")
ZERO = -1
"""Register of an output that is identically zero, and of an operand that an instruction does not have."""

MAX_FIELDS = 24
MAX_PARAMS = 96
MAX_INSTRUCTIONS = 512
"""Limits of the native interpreters: twice what the largest published sum of losses takes."""

HEADER = 3 + len(OUTPUTS)
WORD = 4
"""Numbers of an instruction in the text: the operation and three operands."""


class Op(IntEnum):
    """Instructions of a program. Truth values are the numbers 1 and 0; the order is the encoding."""

    ADD = 0
    SUB = 1
    MUL = 2
    DIV = 3
    NEG = 4
    ABS = 5
    SIGN = 6
    MINIMUM = 7
    MAXIMUM = 8
    CLAMP = 9
    EXP = 10
    EXPM1 = 11
    LOG = 12
    LOG1P = 13
    SQRT = 14
    TANH = 15
    SIGMOID = 16
    LOGSIGMOID = 17
    LT = 18
    LE = 19
    EQ = 20
    WHERE = 21
    POW = 22


ARITY = dict.fromkeys(Op, 2) | {
    **dict.fromkeys((Op.NEG, Op.ABS, Op.SIGN, Op.EXP, Op.EXPM1, Op.LOG, Op.LOG1P), 1),
    **dict.fromkeys((Op.SQRT, Op.TANH, Op.SIGMOID, Op.LOGSIGMOID), 1),
    **dict.fromkeys((Op.CLAMP, Op.WHERE), 3),
}


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
        outputs: registers of ``OUTPUTS``; ``ZERO`` where the output is identically zero.
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
        """The program as operators and kernels take it: decimal numbers with spaces between them.

        ``n_fields n_params n_instructions``, the four outputs, then ``op a b c`` for each instruction. Text, because
        torch.compile would make every integer of a list a variable.
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
            op = Op(numbers[at])
            instructions.append(Instruction(op, tuple(numbers[at + 1 : at + 1 + ARITY[op]])))
        loss, d_logp, d_entropy, d_lse = numbers[3:HEADER]
        return cls(numbers[0], numbers[1], tuple(instructions), (loss, d_logp, d_entropy, d_lse))


@cache
def parsed(text: str) -> Program:
    """``Program.parse``, once per distinct program."""
    return Program.parse(text)
