"""The scalar program: what a one-pass kernel runs once per row.

A token-scope objective becomes a short straight-line program over scalars. It reads the row's statistics and
the batch's fields, and yields the token's loss together with its derivatives with respect to the three
statistics that depend on the logits:

    (logp, entropy, lse, old_logp, ref_logp, advantage; params)  ->  (loss, d_logp, d_entropy, d_lse)

The gradient coefficient of the unified paradigm is GC = -d_logp (Shao et al. 2024, arXiv:2402.03300v3, eq. 1).

Registers are numbered: first the six ``INPUTS``, then the parameters, then one register per instruction.
``csrc/program.h`` interprets the same encoding; ``backends/triton`` prints it as a device function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

INPUTS = ("logp", "entropy", "lse", "old_logp", "ref_logp", "advantage")
STATISTICS = ("logp", "entropy", "lse")
OUTPUTS = ("loss", "d_logp", "d_entropy", "d_lse")
ZERO = -1
"""Register of an output that is identically zero, and of an operand that an instruction does not have."""

MAX_PARAMS = 32
MAX_INSTRUCTIONS = 192
"""Limits of the register file that the native interpreter keeps on its stack."""

HEADER = 2 + len(OUTPUTS)


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
        n_params: number of run-time parameters (the objective's scalars, then constants of the derivation).
        instructions: executed in order.
        outputs: registers of ``OUTPUTS``; ``ZERO`` where the output is identically zero.
    """

    n_params: int
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, int, int, int]

    @property
    def first_param(self) -> int:
        return len(INPUTS)

    @property
    def first_result(self) -> int:
        return len(INPUTS) + self.n_params

    @property
    def reads(self) -> frozenset[str]:
        """Names of the inputs that the program reads."""
        used = {r for i in self.instructions for r in i.args} | set(self.outputs)
        return frozenset(name for r, name in enumerate(INPUTS) if r in used)

    def encode(self) -> list[int]:
        """Flat integers: ``[n_params, n_instructions, *outputs]``, then ``[op, a, b, c]`` per instruction."""
        code = [self.n_params, len(self.instructions), *self.outputs]
        for i in self.instructions:
            code += [int(i.op), *i.args, *[ZERO] * (3 - len(i.args))]
        return code

    @classmethod
    def decode(cls, code: Sequence[int]) -> Program:
        """Inverse of ``encode``.

        Raises:
            ValueError: when the integers are not an encoded program.
        """
        if len(code) < HEADER or len(code) != HEADER + 4 * code[1]:
            raise ValueError(f"program must hold {HEADER} + 4 n integers, got {len(code)}")
        instructions = []
        for at in range(HEADER, len(code), 4):
            op = Op(code[at])
            instructions.append(Instruction(op, tuple(code[at + 1 : at + 1 + ARITY[op]])))
        loss, d_logp, d_entropy, d_lse = code[2:HEADER]
        return cls(code[0], tuple(instructions), (loss, d_logp, d_entropy, d_lse))
