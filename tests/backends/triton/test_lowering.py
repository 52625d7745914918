"""The printed program means what ``program.evaluate`` says, for every instruction and on every kind of number."""

from __future__ import annotations

import inspect
import itertools
import linecache
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import unirl_kernels as uk
from tests.backends.triton.rows import DEVICE, OBJECTIVES
from unirl_kernels.backends.triton import lowering, scalar_math
from unirl_kernels.backends.triton.lowering import OPERATORS, device_function, source
from unirl_kernels.backends.triton.rows import row_fields
from unirl_kernels.program import ZERO, Op, Program, evaluate, parsed, trace
from unirl_kernels.program.ir import Instruction

NUMBERS = (
    *(0.0, 1e-30, 1e-8, 1e-4, 0.3, 0.55, 0.7, 1.0, 1.5, 2.0, 5.0, 20.0, 88.5, 95.0, 1e4, 3e37),
    *(-1e-30, -1e-8, -1e-4, -0.3, -0.7, -1.0, -1.5, -5.0, -20.0, -80.0, -95.0, -1e4),
    *(float("inf"), float("-inf"), float("nan")),
)
FEW = (0.0, 0.3, 1.0, 2.0, -0.3, -1.0, -5.0, float("inf"), float("-inf"), float("nan"))


@triton.jit
def apply(
    params: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    OBJECTIVE: tl.constexpr,
    FIELDS: tl.constexpr,
    N: tl.constexpr,
) -> None:
    i = tl.arange(0, N)
    values = row_fields(inputs, i, tl.full((), N, tl.int32), 3 + FIELDS)
    results = OBJECTIVE(params, *values)
    for k in tl.static_range(4):
        tl.store(outputs + k * N + i, tl.where(i < N, results[k], 0.0))  # which keeps the sign of 0


def run(program: Program, inputs: Tensor, params: tuple[float, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The device function's outputs, and what they mean, in fp64. Inputs are the statistics, then the fields."""
    n = inputs.shape[1]
    padded = torch.nn.functional.pad(inputs, (0, triton.next_power_of_2(n) - n)).to(DEVICE)
    outputs = torch.empty(4, padded.shape[1], dtype=inputs.dtype, device=DEVICE)
    values = torch.tensor(params, dtype=torch.float64)
    objective = device_function(program.text)
    apply[(1,)](values.to(DEVICE), padded, outputs, objective, program.n_fields, padded.shape[1])
    stats, fields = inputs[:3].double(), inputs[3:].double()
    return outputs[:, :n].cpu(), evaluate(program, stats.unbind(), fields, values)


def same(got: Tensor, truth: Tensor, tolerance: float) -> None:
    truth = truth.to(got.dtype)
    tiny = torch.finfo(got.dtype).tiny
    torch.testing.assert_close(got, truth, rtol=tolerance, atol=4 * tiny, equal_nan=True)


def tolerance_of(op: Op, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-6
    # The rounding of y log x, at most 709 where e to it is finite, is the power's relative error.
    return 4e-15 * (math.log(torch.finfo(dtype).max) if op is Op.POW else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_instructions(op: Op, dtype: torch.dtype) -> None:
    numbers = NUMBERS if op.arity < 3 else FEW
    operands = torch.tensor(list(itertools.product(numbers, repeat=op.arity)), dtype=dtype).T
    inputs = torch.zeros(3, operands.shape[1], dtype=dtype)
    inputs[: op.arity] = operands
    program = Program(0, 0, (Instruction(op, tuple(range(op.arity))),), (3, 0, ZERO, 1))
    got, meaning = run(program, inputs)
    for g, truth in zip(got, meaning, strict=True):
        same(g, truth, tolerance_of(op, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_powers(dtype: torch.dtype) -> None:
    """Signs too, as of (-2)^9 and (-0)^-9."""
    inf, nan = float("inf"), float("nan")
    bases = torch.tensor([-0.0, 0.0, -1.0, 1.0, -2.0, -0.5, 3.0, inf, -inf, nan], dtype=dtype)
    exponents = torch.tensor([9.0, -9.0, 10.0, -10.0, 2.5, 0.0, 2.0**24, inf, -inf, nan], dtype=dtype)
    x, y = (v.flatten() for v in torch.meshgrid(bases, exponents, indexing="ij"))
    program = Program(0, 0, (Instruction(Op.POW, (0, 1)),), (3, ZERO, ZERO, ZERO))
    (got, *_), (meaning, *_) = run(program, torch.stack([x, y, y]))
    same(got, meaning, tolerance_of(Op.POW, dtype))
    assert torch.equal(torch.signbit(got) | got.isnan(), torch.signbit(meaning) | meaning.isnan())


def test_every_instruction_is_printed() -> None:
    assert all(op in OPERATORS or hasattr(scalar_math, op.name.lower()) for op in Op)


@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES.values(), *(make().objective for make in (uk.sft, uk.rft, uk.online_rft, uk.ppo, uk.grpo))],
    ids=lambda f: getattr(f, "__name__", type(f).__name__),
)
def test_objectives(objective: Callable[[Any], Any]) -> None:
    traced = trace([objective])
    inputs = torch.randn(3 + traced.program.n_fields, 64, dtype=torch.float64)
    got, meaning = run(traced.program, inputs, traced.params)
    for g, truth in zip(got, meaning, strict=True):
        torch.testing.assert_close(g, truth, rtol=1e-13, atol=1e-13)


def test_parameters_do_not_make_a_new_function() -> None:
    one, other = trace([uk.grpo(0.2, 0.04).objective]), trace([uk.grpo(0.1, 0.5).objective])
    assert one.params != other.params
    assert device_function(one.text) is device_function(other.text)
    assert device_function(trace([uk.sft().objective]).text) is not device_function(one.text)


def test_a_generated_function_is_named_after_its_module_and_source() -> None:
    """Copies of the package in one process may print a program differently; neither may find the other's lines."""
    text = trace([uk.grpo().objective]).text
    function = device_function(text).fn
    assert function.__module__.startswith(f"{lowering.__name__}.objective_")
    assert inspect.getsource(function) == source(parsed(text))
    files = [name for name in linecache.cache if "objective_" in name]
    assert files
    assert all(name.startswith(f"<{lowering.__name__}.") for name in files)


def test_source_needs_no_triton_and_reads_like_the_program() -> None:
    text = source(trace([lambda t: -t.logp * t.advantage]).program)
    assert text.splitlines()[1] == "def objective(params, logp, entropy, lse, f0, f1):"
    assert text.rstrip().splitlines()[-1].startswith("    return v")
    assert "zero = tl.full((), 0, logp.dtype)" in text
