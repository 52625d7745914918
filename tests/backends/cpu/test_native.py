"""The native CPU backend except its numbers: the encoding of programs, refused arguments, memory of gradients."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from unirl_kernels.backends import cpu
from unirl_kernels.backends.groups import ProgramArgs, ReadoutArgs, RowGradients
from unirl_kernels.program import (
    MAX_FIELDS,
    MAX_INSTRUCTIONS,
    MAX_PARAMS,
    ZERO,
    Op,
    Program,
    evaluate,
)
from unirl_kernels.program.ir import Instruction

native = cpu._native()
IDENTITY = ReadoutArgs(1.0, None, 1.0, None)


def test_opcodes_agree() -> None:
    assert native.opcode_names() == [op.name for op in Op]
    limits = (native.MAX_FIELDS, native.MAX_PARAMS, native.MAX_INSTRUCTIONS)
    assert limits == (MAX_FIELDS, MAX_PARAMS, MAX_INSTRUCTIONS)


def run(text: str, fields: Tensor, params: Tensor) -> list[Tensor]:
    """loss and d_logits of a program on rows with the probabilities ``P``; fields: [n_fields, rows]."""
    logits = P.log().expand(1, fields.shape[1], 2).clone()
    target = torch.zeros(1, fields.shape[1], dtype=torch.int64)
    d_logits = torch.empty_like(logits)
    out = cpu.fused_loss(logits, target, IDENTITY, ProgramArgs(text, fields[:, None], params), d_logits, "rows")
    return [out.loss[0], d_logits[0]]


P = torch.tensor([0.25, 0.75], dtype=torch.float64)
"""Probabilities of the rows in ``run``, whose target is the first column."""

STATISTICS = (math.log(0.25), -float(P @ P.log()), 0.0)


def expected(program: Program, fields: Tensor, params: Tensor) -> list[Tensor]:
    stats = [torch.full_like(fields[0], x) for x in STATISTICS]
    loss, *gradients = evaluate(program, stats, fields, params)
    d_logp, d_entropy, d_lse = (x.unsqueeze(-1) for x in gradients)
    one_hot = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return [loss, d_logp * (one_hot - P) + d_lse * P - d_entropy * P * (P.log() + STATISTICS[1])]


@pytest.mark.parametrize("op", Op)
def test_instructions_mean_what_evaluate_says(op: Op) -> None:
    special = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 40.0, -800.0, torch.inf, -torch.inf, torch.nan]
    grid = torch.tensor(list(itertools.product(special, repeat=op.arity)), dtype=torch.float64).T
    fields = torch.cat([grid, torch.randn(op.arity, 200, dtype=torch.float64) * 3], 1)
    if op is Op.CLAMP:
        fields = fields[:, ~(fields[1] > fields[2])]
    args = tuple(range(3, 3 + op.arity))
    program = Program(op.arity, 0, (Instruction(op, args),), (3 + op.arity, ZERO, ZERO, ZERO))
    none = torch.empty(0, dtype=torch.float64)
    got, truth = run(program.text, fields, none), expected(program, fields, none)
    torch.testing.assert_close(got[0], truth[0], rtol=2e-15, atol=0, equal_nan=True)


def random_program(n: int, reach: int) -> Program:
    """Sums, differences and quotients of what the last ``reach`` instructions gave, of statistics, fields, params."""
    first = 3 + MAX_FIELDS + MAX_PARAMS
    instructions = []
    for i in range(n):
        recent = list(range(max(first, first + i - reach), first + i)) + torch.randint(0, first, (2,)).tolist()
        args = tuple(recent[int(k)] for k in torch.randint(0, len(recent), (2,)))
        op = (Op.ADD, Op.SUB, Op.MUL, Op.TANH)[int(torch.randint(0, 4, ()))]
        instructions.append(Instruction(op, args[: op.arity]))
    outputs = torch.randint(0, first + n, (4,)).tolist()
    return Program(MAX_FIELDS, MAX_PARAMS, tuple(instructions), (first + n - 1, *outputs[1:]))


@pytest.mark.parametrize("reach", [1, 5, 60])
def test_results_keep_their_registers_as_long_as_they_are_read(reach: int) -> None:
    for n in (0, 1, 30, MAX_INSTRUCTIONS):
        torch.manual_seed(n)
        program = random_program(n, reach)
        fields = torch.randn(MAX_FIELDS, 5, dtype=torch.float64)
        params = torch.randn(MAX_PARAMS, dtype=torch.float64)
        for got, truth in zip(run(program.text, fields, params), expected(program, fields, params), strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)


def sum_of(n: int) -> Program:
    """n results, all of which are read only afterwards: the sum of two takes the register of one."""
    values = [Instruction(Op.NEG, (1,)) for _ in range(n)]
    sums = [Instruction(Op.ADD, (3 if i == 0 else 2 + n + i, 4 + i)) for i in range(n - 1)]
    return Program(0, 0, (*values, *sums), (2 + len(values) + len(sums), ZERO, ZERO, ZERO))


def test_results_that_wait_are_limited() -> None:
    most = native.MAX_LIVE
    none, fields = torch.empty(0, dtype=torch.float64), torch.empty(0, 1, dtype=torch.float64)
    assert run(sum_of(most).text, fields, none)[0].item() == pytest.approx(-most * STATISTICS[1])
    message = f"program must keep at most {most} results for later instructions at a time, instruction {most} is"
    with pytest.raises(ValueError, match=message):
        run(sum_of(most + 1).text, fields, none)


def test_programs_are_checked() -> None:
    fields, params = torch.ones(1, 2, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    good = "1 1 1 5 -1 -1 -1 0 3 4 -1"
    assert torch.equal(run(good, fields, params)[0], torch.full((2,), 3.0, dtype=torch.float64))
    assert torch.equal(run(f"  {good} ", fields, params)[0], torch.full((2,), 3.0, dtype=torch.float64))
    too_long = f"1 1 {MAX_INSTRUCTIONS + 1} 5 -1 -1 -1" + " 0 3 4 -1" * (MAX_INSTRUCTIONS + 1)
    for text, message in (
        (good[:-3], r"program must hold 7 \+ 4 n numbers for its n instructions, got 10"),
        ("", "program must hold .* got 0"),
        ("1 1 2 5 -1 -1 -1 0 3 4 -1", "program must hold .* got 11"),
        ("1 1 1 5 -1 -1 -1 0 3 x -1", "program must be integers with spaces between them, got 'x -1'"),
        ("1 1 1 5 -1 -1 -1 0 3 4.5 -1", "program must be integers with spaces between them, got '4.5 -1'"),
        (too_long, f"program must have at most {MAX_INSTRUCTIONS} instructions, got {MAX_INSTRUCTIONS + 1}"),
        ("25 0 0 -1 -1 -1 -1", "program must have at most 24 fields, got 25"),
        ("0 97 0 -1 -1 -1 -1", "program must have at most 96 params, got 97"),
        ("0 -1 0 -1 -1 -1 -1", "program must have at most 96 params, got -1"),
        (f"1 1 1 5 -1 -1 -1 {len(Op)} 3 4 -1", r"instruction 0 must be an opcode in \[0, 23\), got 23"),
        ("1 1 1 5 -1 -1 -1 0 3 5 -1", r"operand 1 of instruction 0 must be a register in \[0, 5\), got 5"),
        ("1 1 1 5 -1 -1 -1 0 -1 4 -1", "operand 0 of instruction 0 must be a register"),
        ("1 1 1 6 -1 -1 -1 0 3 4 -1", r"output 0 must be a register in \[0, 6\), got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            run(text, fields, params)


def test_fields_and_params_are_checked() -> None:
    text, fields, params = "1 1 1 5 -1 -1 -1 0 3 4 -1", torch.ones(1, 1, 2), torch.ones(1, dtype=torch.float64)
    logits, target = torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.int64)
    for wrong, message in (
        (
            fields.double(),
            r"fields must be contiguous Float on cpu with shape \[n_fields, B, L\] = \[1, 1, 2\], got Dou",
        ),
        (fields[0], r"fields must be contiguous Float .* got Float \[1, 2\] on cpu"),
        (torch.ones(2, 1, 2), "fields must be contiguous Float"),
        (torch.ones(1, 1, 4)[..., ::2], "fields must be contiguous Float"),
        (without_memory(fields), "fields must have memory"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.fused_loss(logits, target, IDENTITY, ProgramArgs(text, wrong, params), logits, "rows")
    for wrong, message in (
        (params.float(), "params must be a contiguous Double vector on cpu with the program's 1 numbers, got Float"),
        (torch.ones(2, dtype=torch.float64), r"the program's 1 numbers, got Double \[2\] on cpu"),
        (without_memory(params), "params must have memory"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.fused_loss(logits, target, IDENTITY, ProgramArgs(text, fields, wrong), logits, "rows")


def test_tensors_are_checked() -> None:
    logits, target = torch.randn(1, 3, 100), torch.zeros(1, 3, dtype=torch.int64)
    for arguments, message in (
        ((logits.int(), target), "logits must be float32, bfloat16, float16 or float64, got Int"),
        ((logits[0], target), r"logits must have shape \[B, L, V\]"),
        ((logits.transpose(1, 2), torch.zeros(1, 100, dtype=torch.int64)), "logits must have stride 1"),
        ((logits, target.int()), "target must be Long, got Int"),
        ((logits, target[:, :2]), "target must be contiguous on cpu with a value per row"),
        (
            (without_memory(logits), target),
            r"logits must have memory for its shape \[1, 3, 100\], which takes 1200 byt",
        ),
        ((logits, without_memory(target)), "target must have memory"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.token_stats(*arguments, IDENTITY)


def without_memory(x: Tensor) -> Tensor:
    """A tensor as sharded training leaves a parameter: with its shape, but an empty storage."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def test_freed_memory_is_not_touched() -> None:
    logits, target = torch.randn(1, 3, 100), torch.zeros(1, 3, dtype=torch.int64)
    moments = cpu.token_stats(logits, target, IDENTITY).moments
    gradients = RowGradients(*torch.ones(3, 1, 3))
    given = {"d_logits": logits.clone(), "d_lse": gradients.d_lse, "sz": moments.sz}
    for name, x in given.items():
        freed = given | {name: without_memory(x)}
        arguments = (moments._replace(sz=freed["sz"]), gradients._replace(d_lse=freed["d_lse"]), freed["d_logits"])
        with pytest.raises(ValueError, match=f"{name} must have memory"):
            cpu.token_stats_backward(logits, target, IDENTITY, *arguments)
    half = torch.randn(1, 6, 100)
    half.untyped_storage().resize_(1200)
    with pytest.raises(ValueError, match="which takes 2400 bytes; its storage has 1200"):
        cpu.token_stats(half, torch.zeros(1, 6, dtype=torch.int64), IDENTITY)
    cpu.token_stats(half[:, :3], target, IDENTITY)
    row = IDENTITY._replace(row_temperature=without_memory(torch.ones(1, 3)))
    with pytest.raises(ValueError, match="row_temperature must have memory"):
        cpu.token_stats(logits, target, row)
    assert cpu.token_stats(without_memory(logits[:, :0]), target[:, :0], IDENTITY).stats.logp.shape == (1, 0)


def test_gradient_memory_is_reused_and_released() -> None:
    cpu.release_memory()
    large = torch.empty(1, 16, 2**18)
    first = cpu.empty(large.shape, large.dtype, large.device)
    assert first.is_contiguous()
    assert (first.shape, first.dtype) == (large.shape, large.dtype)
    address = first.data_ptr()
    assert address % 2**21 == 0
    del first
    smaller = cpu.empty(large[:, :9].shape, large.dtype, large.device)
    assert smaller.data_ptr() == address
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
        assert cpu.unavailable(here) == "the native extension is not built"
    assert cpu.unavailable(here) is None


def test_the_extension_has_no_symbol_of_torch() -> None:
    """The extension then runs with every torch, not only the one of its build."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(["nm", "-DC", native.__file__], check=True, capture_output=True, text=True).stdout
    assert "GOMP_parallel" in symbols
    assert [line for line in symbols.splitlines() if re.search("at::|c10|torch", line)] == []


IMPORTED = """
import torch
{before}
import unirl_kernels._C
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("del torch.Tensor.__dlpack_c_exchange_api__", "torch.Tensor must have DLPack's exchange functions"),
        (
            "torch.Tensor.__dlpack_c_exchange_api__ = {}",
            "torch.Tensor must have the exchange functions of DLPack 1, got",
        ),
    ],
    ids=["none", "another version"],
)
def test_torch_without_exchange_functions_is_refused(before: str, said: str) -> None:
    """One torch has no exchange functions, the other has those of version 9 only."""
    capsule = (
        "import ctypes; version = (ctypes.c_uint32 * 32)(9, 1)\n"
        "ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object\n"
        "ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]\n"
        "made = ctypes.pythonapi.PyCapsule_New(version, b'dlpack_exchange_api', None)\n"
    )
    code = IMPORTED.format(before=capsule + before.replace("{}", "made"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert f"ImportError: {said}" in result.stderr


THREADS = """
import os, sys, threading, torch
from unirl_kernels.backends import cpu
from unirl_kernels.backends.groups import ReadoutArgs
native = cpu._native()
torch.set_num_threads(3)
logits, target = torch.zeros(1, 300, 9000), torch.zeros(1, 300, dtype=torch.int64)
out = cpu.token_stats(logits[:, :0], target[:, :0], ReadoutArgs(1.0, None, 1.0, None))
out = type(out)(*(type(part)(*(torch.empty(1, 300) for _ in part)) for part in out))
counted = []
def call():
    before = len(os.listdir("/proc/self/task"))
    native.token_stats(logits, target, -100, ReadoutArgs(1.0, None, 1.0, None), out)
    counted.append(len(os.listdir("/proc/self/task")) - before)
other = threading.Thread(target=call)
other.start()
other.join()
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "omp" in os.path.basename(line.split()[-1])}
print(*counted, len(runtimes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_threads_are_those_of_torch() -> None:
    """Also in a thread that has not called torch yet: until then it has OMP_NUM_THREADS threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["2", "1"], result.stderr


@pytest.mark.parametrize("start", [0, 1, 50])
def test_views_of_freed_memory_are_refused(start: int) -> None:
    """The address of such a view is its offset, not 0."""
    logits, whole = torch.randn(1, 3, 50), torch.randn(1, 3, 100)
    target, d_logits = torch.zeros(1, 3, dtype=torch.int64), whole[..., start : start + 50]
    moments = cpu.token_stats(logits, target, IDENTITY).moments
    whole.untyped_storage().resize_(0)
    assert d_logits.data_ptr() == 4 * start
    with pytest.raises(ValueError, match="logits must have memory"):
        cpu.token_stats(d_logits, target, IDENTITY)
    with pytest.raises(ValueError, match="d_logits must have memory"):
        cpu.token_stats_backward(
            logits, target, IDENTITY, moments, RowGradients(torch.ones(1, 3), None, None), d_logits
        )


def test_a_dtype_that_is_not_multiplied_has_no_variant() -> None:
    with pytest.raises(ValueError, match="matmuls take Float, BFloat16 or Half, not Double"):
        native.matmul_variant(torch.float64)


def test_a_shape_beyond_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="shape must be that of a tensor in memory"):
        native.empty([42007935, 439125228929], torch.uint8)


def test_any_number_of_bytes_may_be_kept() -> None:
    code = "import torch; from unirl_kernels.backends import cpu; print(cpu.unavailable(torch.device('cpu')))"
    environment = os.environ | {"UNIRL_CPU_CACHE_BYTES": "9" * 30}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert result.stdout.strip() == "None", result.stderr
