"""The native CPU backend apart from its numbers: the program's encoding, what it refuses, gradient memory."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from unirl_kernels.backends import ReadoutArgs, RowFields, cpu
from unirl_kernels.program import INPUTS, MAX_INSTRUCTIONS, MAX_PARAMS, ZERO, Op, Program, evaluate
from unirl_kernels.program.ir import ARITY, Instruction

native = cpu._native()
IDENTITY = ReadoutArgs(1.0, None, 1.0, None)


def test_opcodes_agree() -> None:
    assert native.opcode_names() == [op.name for op in Op]
    assert (native.MAX_PARAMS, native.MAX_INSTRUCTIONS) == (MAX_PARAMS, MAX_INSTRUCTIONS)


def run_program(program: Program, params: Tensor, fields: Tensor) -> Tensor:
    """The program's loss on rows of one word, whose logp, entropy and lse are 0."""
    old_logp, ref_logp, advantage = fields
    rows = torch.zeros(1, fields.shape[-1], 1, dtype=torch.float64)
    target = torch.zeros(1, fields.shape[-1], dtype=torch.int64)
    given = RowFields(torch.ones_like(old_logp), advantage, old_logp, ref_logp)
    out = cpu.fused_loss(rows, target, given, IDENTITY, program.encode(), params, torch.empty_like(rows), "rows")
    return out.loss


@pytest.mark.parametrize("op", Op)
def test_instructions_mean_what_evaluate_says(op: Op) -> None:
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 40.0, -800.0, torch.inf, -torch.inf, torch.nan]
    grid = torch.tensor(list(itertools.product(special, repeat=ARITY[op])), dtype=torch.float64).T
    values = torch.cat([grid, torch.randn(ARITY[op], 200, dtype=torch.float64) * 3], 1)
    if op is Op.CLAMP:
        values = values[:, ~(values[1] > values[2])]
    fields = torch.zeros(3, 1, values.shape[1], dtype=torch.float64)
    fields[: ARITY[op], 0] = values
    names = ("old_logp", "ref_logp", "advantage")
    args = tuple(INPUTS.index(name) for name in names[: ARITY[op]])
    program = Program(0, (Instruction(op, args),), (len(INPUTS), ZERO, ZERO, ZERO))
    params = torch.empty(0, dtype=torch.float64)
    inputs = dict(zip(names, fields, strict=True)) | {"logp": torch.zeros_like(fields[0])}
    expected = evaluate(program, inputs, params)[0]
    torch.testing.assert_close(run_program(program, params, fields), expected, rtol=1e-15, atol=0, equal_nan=True)


def test_programs_are_checked() -> None:
    fields = torch.zeros(3, 1, 2, dtype=torch.float64)
    header, add = [1, 1, 7, ZERO, ZERO, ZERO], [int(Op.ADD), 3, 6, ZERO]
    good = header + add
    rows, target = torch.zeros(1, 2, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)

    def run(code: list[int], params: int = 1, **missing: None) -> Tensor:
        given = RowFields(torch.ones_like(fields[0]), *fields)._replace(**missing)
        values = torch.full((params,), 2.0, dtype=torch.float64)
        return cpu.fused_loss(rows, target, given, IDENTITY, code, values, torch.empty_like(rows), "rows").loss

    assert torch.equal(run(good), torch.full((1, 2), 2.0, dtype=torch.float64))
    too_long = [1, MAX_INSTRUCTIONS + 1, 7, ZERO, ZERO, ZERO] + add * (MAX_INSTRUCTIONS + 1)
    for code, message in (
        (good[:-1], r"code must hold 6 \+ 4 n integers"),
        (too_long, f"n <= {MAX_INSTRUCTIONS} instructions"),
        ([*header, len(Op), 3, 6, ZERO], r"instruction 0 must be an opcode in \[0, 22\), got 22"),
        ([*header, int(Op.ADD), 3, 7, ZERO], r"operand 1 of instruction 0 must be a register in \[0, 7\), got 7"),
        ([*header, int(Op.ADD), ZERO, 6, ZERO], "operand 0 of instruction 0 must be a register"),
        ([1, 1, 8, ZERO, ZERO, ZERO, *add], r"output 0 must be a register in \[0, 8\), got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            run(code)
    with pytest.raises(ValueError, match="params must hold the program's 1 numbers, at most 32, got 2"):
        run(good, params=2)
    with pytest.raises(ValueError, match="ref_logp must be given: the objective reads it"):
        run([*header, int(Op.ADD), INPUTS.index("ref_logp"), 6, ZERO], ref_logp=None)
    with pytest.raises(ValueError, match="advantage must be given"):
        run([1, 0, INPUTS.index("advantage"), ZERO, ZERO, ZERO], advantage=None)


def test_tensors_are_checked() -> None:
    logits, target = torch.randn(1, 3, 100), torch.zeros(1, 3, dtype=torch.int64)
    for arguments, message in (
        ((logits.int(), target), "logits must be float32, bfloat16, float16 or float64, got Int"),
        ((logits[0], target), r"logits must have shape \[B, L, V\]"),
        ((logits.transpose(1, 2), torch.zeros(1, 100, dtype=torch.int64)), "logits must have stride 1"),
        ((logits, target.int()), "target must be Long, got Int"),
        ((logits, target[:, :2]), "target must be contiguous on cpu with a value per row"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.token_stats(*arguments, IDENTITY)


def test_gradient_memory_is_reused_and_released() -> None:
    cpu.release_memory()
    large = torch.empty(1, 16, 2**18)
    first = cpu.empty(large.shape, large.dtype, large.device)
    assert first.is_contiguous()
    assert (first.shape, first.dtype) == (large.shape, large.dtype)
    place = first.data_ptr()
    assert place % 2**21 == 0
    del first
    smaller = cpu.empty(large[:, :9].shape, large.dtype, large.device)
    assert smaller.data_ptr() == place
    assert native.kept_bytes() == 0
    del smaller
    larger = cpu.empty((1, 17, 2**18), torch.float32, large.device)
    assert native.kept_bytes() == 0, "what is too small goes back before new memory is taken"
    del larger
    assert cpu.release_memory() == 18 * 2**20
    native.limit_kept_bytes(2**20)
    assert cpu.empty(large.shape, large.dtype, large.device) is not None
    assert native.kept_bytes() == 0
    cpu.release_memory()


def test_scaling_by_one_is_free() -> None:
    x = torch.randn(2, 3, 50).bfloat16()
    before, version = x.clone(), x._version
    cpu.scale_(x, torch.tensor(1.0))
    assert x._version == version
    cpu.scale_(x, torch.tensor(0.5))
    assert torch.equal(x, before * 0.5)


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    assert cpu.unavailable(torch.device("cuda")) == "it runs on the cpu only"
    cpu._native.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("UNIRL_CPU_CACHE_BYTES", "much")
        assert cpu.unavailable(here) == "UNIRL_CPU_CACHE_BYTES must be a number of bytes, got 'much'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "unirl_kernels._C", None)
        assert "the native extension is not built or does not load" in str(cpu.unavailable(here))
    assert cpu.unavailable(here) is None
