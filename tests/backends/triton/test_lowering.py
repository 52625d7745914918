"""The printed program means what ``program.evaluate`` says, for every instruction and on every kind of number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import unirl_kernels as uk
from tests.backends.triton.rows import DEVICE, OBJECTIVES
from unirl_kernels.backends.triton.lowering import EXPRESSIONS, device_function, source
from unirl_kernels.program import INPUTS, ZERO, Op, Program, evaluate, trace
from unirl_kernels.program.ir import ARITY, Instruction

NUMBERS = (
    *(0.0, 1e-30, 1e-8, 1e-4, 0.3, 0.55, 0.7, 1.0, 1.5, 2.0, 5.0, 20.0, 88.5, 95.0, 1e4, 3e37),
    *(-1e-30, -1e-8, -1e-4, -0.3, -0.7, -1.0, -1.5, -5.0, -20.0, -80.0, -95.0, -1e4),
    *(float("inf"), float("-inf"), float("nan")),
)
FEW = (0.0, 0.3, 1.0, 2.0, -0.3, -1.0, -5.0, float("inf"), float("-inf"), float("nan"))


@triton.jit
def apply(params: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, OBJECTIVE: tl.constexpr, N: tl.constexpr) -> None:
    at = inputs + tl.arange(0, N)
    logp, entropy, lse = tl.load(at), tl.load(at + N), tl.load(at + 2 * N)
    old_logp, ref_logp, advantage = tl.load(at + 3 * N), tl.load(at + 4 * N), tl.load(at + 5 * N)
    loss, d_logp, d_entropy, d_lse = OBJECTIVE(params, logp, entropy, lse, old_logp, ref_logp, advantage)
    to = outputs + tl.arange(0, N)
    tl.store(to, loss)
    tl.store(to + N, d_logp)
    tl.store(to + 2 * N, tl.zeros((N,), logp.dtype) + d_entropy)
    tl.store(to + 3 * N, tl.zeros((N,), logp.dtype) + d_lse)


def run(program: Program, inputs: Tensor, params: tuple[float, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The device function's outputs, and what they mean, in fp64."""
    n = inputs.shape[1]
    padded = torch.nn.functional.pad(inputs, (0, triton.next_power_of_2(n) - n)).to(DEVICE)
    outputs = torch.empty(4, padded.shape[1], dtype=inputs.dtype, device=DEVICE)
    values = torch.tensor(params, dtype=torch.float64)
    apply[(1,)](values.to(DEVICE), padded, outputs, device_function(tuple(program.encode())), padded.shape[1])
    meaning = evaluate(program, dict(zip(INPUTS, inputs.double().unbind(), strict=True)), values)
    return outputs[:, :n].cpu(), meaning


def same(got: Tensor, truth: Tensor, tolerance: float) -> None:
    truth = truth.to(got.dtype)
    tiny = torch.finfo(got.dtype).tiny
    torch.testing.assert_close(got, truth, rtol=tolerance, atol=4 * tiny, equal_nan=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 4e-15)], ids=str)
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_instructions(op: Op, dtype: torch.dtype, tolerance: float) -> None:
    numbers = NUMBERS if ARITY[op] < 3 else FEW
    operands = torch.tensor(list(itertools.product(numbers, repeat=ARITY[op])), dtype=dtype).T
    inputs = torch.zeros(len(INPUTS), operands.shape[1], dtype=dtype)
    inputs[: ARITY[op]] = operands
    program = Program(0, (Instruction(op, tuple(range(ARITY[op]))),), (len(INPUTS), 0, ZERO, 1))
    got, meaning = run(program, inputs)
    for g, truth in zip(got, meaning, strict=True):
        same(g, truth, tolerance)


def test_every_instruction_is_printed() -> None:
    assert set(EXPRESSIONS) == set(Op)


@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES.values(), *(make().objective for make in (uk.sft, uk.rft, uk.online_rft, uk.ppo, uk.grpo))],
    ids=lambda f: getattr(f, "__name__", type(f).__name__),
)
def test_objectives(objective: Callable[[Any], Any]) -> None:
    traced = trace(objective)
    inputs = torch.randn(len(INPUTS), 64, dtype=torch.float64)
    got, meaning = run(traced.program, inputs, traced.params)
    for g, truth in zip(got, meaning, strict=True):
        torch.testing.assert_close(g, truth, rtol=1e-13, atol=1e-13)


def test_parameters_do_not_make_a_new_function() -> None:
    one, other = trace(uk.grpo(0.2, 0.04).objective), trace(uk.grpo(0.1, 0.5).objective)
    assert one.params != other.params
    assert device_function(tuple(one.program.encode())) is device_function(tuple(other.program.encode()))
    assert device_function(tuple(trace(uk.sft().objective).program.encode())) is not device_function(
        tuple(one.program.encode())
    )


def test_source_needs_no_triton_and_reads_like_the_program() -> None:
    text = source(trace(lambda t: -t.logp * t.advantage).program)
    assert text.splitlines()[1] == "def objective(params, logp, entropy, lse, old_logp, ref_logp, advantage):"
    assert text.rstrip().splitlines()[-1].startswith("    return v")
    assert "zero = tl.full((), 0, logp.dtype)" in text
