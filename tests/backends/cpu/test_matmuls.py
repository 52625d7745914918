"""The native matmuls of a linear head: numbers, strides, bits, and what they refuse, in every variant.

As in ``test_instruction_sets``, this file runs again in fresh processes with the other instruction sets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from unirl_kernels.backends import cpu
from unirl_kernels.testing.budgets import violations

native = cpu._native()
AVAILABLE = not cpu.matmuls_unavailable(torch.float32)
needs_matmuls = pytest.mark.skipif(not AVAILABLE, reason=cpu.matmuls_unavailable(torch.float32) or "they run")


@pytest.fixture(params=cpu.matmul_variants())
def _each_variant(request: pytest.FixtureRequest) -> Iterator[None]:
    with cpu.forced_matmuls(request.param):
        yield


with_each_variant = pytest.mark.usefixtures("_each_variant")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 1),
    (3, 5, 7),
    (16, 48, 96),  # whole vectors and panels
    (17, 33, 129),  # and one more
    (2, 320, 1031),
    (40, 641, 77),  # two blocks of depth, then three
    (9, 1301, 50),
    (250, 31, 500),
    (700, 20, 30),  # the tokens are the largest dimension
    (1, 64, 3001),
    (5, 2, 20011),
)
"""(n, D, V)"""


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    d_logits: Tensor


def case(n: int, d: int, vocab: int, dtype: torch.dtype) -> Case:
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(vocab, d) / d**0.5).to(dtype)
    return Case(hidden, weight, torch.randn(vocab), torch.randn(n, vocab))


def multiplied(d_logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients of logits as the matmuls see them."""
    return d_logits.bfloat16().float() if cpu.matmul_arithmetic(dtype) == "bf16" else d_logits


def logits_of(x: Case, bias: Tensor | None = None) -> Tensor:
    out = torch.full((len(x.hidden), len(x.weight)), torch.nan)
    native.logits_matmul(x.hidden, x.weight, bias, out)
    return out


def d_hidden_of(x: Case) -> Tensor:
    out = torch.full((len(x.d_logits), x.weight.shape[1]), torch.nan)
    native.d_hidden_matmul(x.d_logits, x.weight, out)
    return out


def d_weight_of(x: Case) -> Tensor:
    total = torch.full((x.d_logits.shape[1], x.hidden.shape[1]), torch.nan)
    native.d_weight_matmul(x.d_logits, x.hidden, total, False)
    return total


MATMULS: dict[str, Callable[[Case], Tensor]] = {
    "logits": logits_of,
    "d_hidden": d_hidden_of,
    "d_weight": d_weight_of,
}


def by_torch(matmul: str, x: Case) -> Tensor:
    """In the dtype of the case."""
    if matmul == "logits":
        return x.hidden @ x.weight.t()
    return x.d_logits @ x.weight if matmul == "d_hidden" else x.d_logits.t() @ x.hidden


def wide(x: Case, dtype: torch.dtype) -> Case:
    """The numbers that are multiplied, in fp32 or fp64."""
    exact = x._replace(d_logits=multiplied(x.d_logits, x.weight.dtype))
    return Case(*(part.to(dtype) for part in exact))


def assert_right(matmul: str, got: Tensor, x: Case) -> None:
    plain, truth = by_torch(matmul, wide(x, torch.float32)), by_torch(matmul, wide(x, torch.float64))
    assert not violations(got, plain, truth), (matmul, x.weight.dtype, tuple(x.weight.shape), tuple(x.hidden.shape))


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(x: Tensor, gap: int) -> Tensor:
    """The same numbers in rows with NaN between them."""
    memory = torch.full((len(x), x.shape[1] + gap), torch.nan, dtype=x.dtype)
    memory[:, : x.shape[1]] = x
    return memory[:, : x.shape[1]]


def every_other(x: Tensor) -> Tensor:
    memory = torch.full((len(x), 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    memory[:, ::2] = x
    return memory[:, ::2]


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matmul", MATMULS)
def test_matmuls_err_no_more_than_torch_in_fp32(matmul: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = case(*shape, dtype)
        assert_right(matmul, MATMULS[matmul](x), x)


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [lambda x: spread(x, 3), transposed, every_other], ids=["rows", "t", "elements"])
def test_strides_do_not_change_a_bit(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = case(37, 70, 203, dtype)
    for matmul in MATMULS.values():
        expected = matmul(x)
        for name in ("hidden", "weight", "d_logits"):
            assert torch.equal(matmul(x._replace(**{name: layout(getattr(x, name))})), expected), name


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_rows_that_lie_apart(dtype: torch.dtype) -> None:
    x = case(37, 70, 203, dtype)

    def apart(rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns + 5), 3.0)[:, :columns]

    logits, d_hidden, d_weight = apart(37, 203), apart(37, 70), apart(203, 70)
    native.logits_matmul(x.hidden, x.weight, None, logits)
    native.d_hidden_matmul(x.d_logits, x.weight, d_hidden)
    native.d_weight_matmul(x.d_logits, x.hidden, d_weight, False)
    for got, matmul in zip((logits, d_hidden, d_weight), MATMULS.values(), strict=True):
        assert torch.equal(got, matmul(x))
        memory = got.as_strided((len(got), got.stride(0)), got.stride())
        assert bool((memory[:, got.shape[1] :] == 3).all()), "beside the result nothing is written"


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 70, 700])
def test_bias_is_added_once(d: int, dtype: torch.dtype) -> None:
    x = case(21, d, 203, dtype)
    got = logits_of(x, x.bias)
    parts = wide(x, torch.float64)
    plain = torch.addmm(x.bias, x.hidden.float(), x.weight.float().t())
    assert not violations(got, plain, torch.addmm(parts.bias, parts.hidden, parts.weight.t()))
    assert torch.equal(logits_of(x, x.bias.bfloat16()), logits_of(x, x.bias.bfloat16().float()))


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 50, 650])
def test_accumulation_adds_to_what_is_there(n: int, dtype: torch.dtype) -> None:
    x = case(n, 70, 203, dtype)
    total = torch.randn(203, 70)
    exact, plain = wide(x, torch.float64), wide(x, torch.float32)
    truth = torch.addmm(total.double(), exact.d_logits.t(), exact.hidden)
    expected = torch.addmm(total, plain.d_logits.t(), plain.hidden)
    native.d_weight_matmul(x.d_logits, x.hidden, total, True)
    assert not violations(total, expected, truth)


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_logits_round_to_nearest_even(dtype: torch.dtype) -> None:
    half = 2.0**-8  # half the last place of a bf16 in [1, 2)
    values = [1 + half, 1 + 3 * half, 1 + half + 2**-20, -1 - half, 1e-8, 3e38]
    x = case(6, 1, 1, dtype)._replace(d_logits=torch.tensor(values)[:, None], weight=torch.ones(1, 1, dtype=dtype))
    assert d_hidden_of(x).flatten().tolist() == multiplied(x.d_logits, dtype).flatten().tolist()
    # The other paths into a panel: lanes or depth side by side in memory.
    many = torch.tensor(values).repeat(6, 16)
    for d_logits in (many, transposed(many)):
        x = Case(torch.eye(6).to(dtype), torch.eye(96).to(dtype), torch.empty(0), d_logits)
        assert torch.equal(d_hidden_of(x), multiplied(many, dtype))
        assert torch.equal(d_weight_of(x), multiplied(many, dtype).t())


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matmul", MATMULS)
def test_same_bits_on_a_rerun_and_on_any_number_of_threads(matmul: str, dtype: torch.dtype) -> None:
    for shape in ((70, 333, 3001), (130, 1100, 700)):
        x = case(*shape, dtype)
        expected = MATMULS[matmul](x)
        assert torch.equal(MATMULS[matmul](x), expected)
        for n in (1, 2, 3, 7):
            with threads(n):
                assert torch.equal(MATMULS[matmul](x), expected), n


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_company(dtype: torch.dtype) -> None:
    x = case(70, 333, 3001, dtype)
    tokens, columns = slice(5, 8), slice(100, 1001)
    few = x._replace(hidden=x.hidden[tokens], d_logits=x.d_logits[tokens])
    assert torch.equal(logits_of(few), logits_of(x)[tokens])
    assert torch.equal(d_hidden_of(few), d_hidden_of(x)[tokens])
    part = x._replace(weight=x.weight[columns], d_logits=x.d_logits[:, columns])
    assert torch.equal(logits_of(part), logits_of(x)[:, columns])
    assert torch.equal(d_weight_of(part), d_weight_of(x)[columns])


@needs_matmuls
@with_each_variant
def test_same_bits_of_factors_larger_than_what_is_kept() -> None:
    x = case(400, 3001, 3100, torch.float32)
    assert torch.equal(logits_of(x._replace(hidden=x.hidden[340:])), logits_of(x)[340:])
    x = Case(torch.randn(3001, 400), x.weight, x.bias, torch.randn(3001, 3100))
    assert torch.equal(d_weight_of(x._replace(hidden=x.hidden[:, 340:])), d_weight_of(x)[:, 340:])


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_reach_what_depends_on_them_and_no_more(odd: float, dtype: torch.dtype) -> None:
    n, d, vocab = 11, 37, 53
    for token, unit, column in ((0, 0, 0), (10, 36, 52), (7, 20, 30)):
        x = Case(*(part.abs() + 1 for part in case(n, d, vocab, dtype)))
        for name, at, hit in (
            ("hidden", (token, unit), {"logits": (token,), "d_weight": (..., unit)}),
            ("weight", (column, unit), {"logits": (..., column), "d_hidden": (..., unit)}),
            ("d_logits", (token, column), {"d_hidden": (token,), "d_weight": (column,)}),
        ):
            broken = getattr(x, name).clone()
            broken[at] = odd
            for matmul, where in hit.items():
                expected = MATMULS[matmul](x)
                expected[where] = odd
                got = MATMULS[matmul](x._replace(**{name: broken}))
                assert torch.equal(got.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0)), (name, matmul)


@needs_matmuls
@with_each_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_dimensions(dtype: torch.dtype) -> None:
    no_tokens, no_columns, no_units = case(0, 5, 7, dtype), case(3, 5, 0, dtype), case(3, 0, 7, dtype)
    assert logits_of(no_tokens).shape == (0, 7)
    assert torch.equal(d_weight_of(no_tokens), torch.zeros(7, 5))
    total = torch.ones(7, 5)
    native.d_weight_matmul(no_tokens.d_logits, no_tokens.hidden, total, True)
    assert torch.equal(total, torch.ones(7, 5))
    assert torch.equal(d_hidden_of(no_columns), torch.zeros(3, 5))
    assert torch.equal(logits_of(no_units, no_units.bias), no_units.bias.expand(3, 7))


def without_memory(x: Tensor) -> Tensor:
    """A parameter as sharded training leaves it: with its shape, but an empty storage."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@needs_matmuls
def test_arguments_are_checked() -> None:
    h, w, g, b = torch.randn(3, 5), torch.randn(7, 5), torch.randn(3, 7), torch.randn(7)
    logits, d_hidden, d_weight = torch.empty(3, 7), torch.empty(3, 5), torch.empty(7, 5)
    column_major = torch.empty(7, 3).t()
    for arguments, message in (
        ((h, w.double(), b, logits), "weight must have a dtype that is multiplied on this machine: matmuls take"),
        ((h, w.int(), b, logits), "or Half, not Int"),
        ((h, w[0], b, logits), "weight must have two dimensions"),
        ((h[0], w, b, logits), "hidden must have two dimensions"),
        ((h[:, :4], w, b, logits), r"weight must have shape \[V, D\] = \[7, 4\], got \[7, 5\]"),
        ((h.bfloat16(), w, b, logits), "hidden must be Float like weight, got BFloat16"),
        ((h, w, b, logits[:2]), r"out must have shape \[n, V\] = \[3, 7\], got \[2, 7\]"),
        ((h, w, b, logits.bfloat16()), "out must be Float, got BFloat16"),
        ((h, w, b, column_major), "out must have stride 1 in its last dimension, got 3"),
        ((h, w, b, logits[:1].expand(3, 7)), r"out must have rows that do not overlap, got strides \[0, 1\]"),
        ((h, w, b[:6], logits), r"bias must be floating on the cpu with shape \[V\] = \[7\], got Float \[6\] on cpu"),
        ((h, w, b.int(), logits), r"bias must be floating on the cpu with shape \[V\] = \[7\], got Int"),
        (
            (without_memory(h), w, b, logits),
            r"hidden must have memory for its shape \[3, 5\], which takes 60 bytes; its",
        ),
        ((h, without_memory(w), b, logits), "weight must have memory"),
        ((h, w, without_memory(b.bfloat16()), logits), "bias must have memory"),
        ((h, w, b, without_memory(logits)), "out must have memory"),
        ((h, w, b, logits.to("meta")), "out must be a dense tensor on the cpu, got Strided on meta"),
        ((h.to("meta"), w, b, logits), "hidden must be a dense tensor on the cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            native.logits_matmul(*arguments)
    for arguments, message in (
        ((g, w.double(), d_hidden), "weight must have a dtype that"),
        ((g[0], w, d_hidden), "d_logits must have two dimensions"),
        ((g[:, :6], w, d_hidden), r"weight must have shape \[V, D\] = \[6, 5\], got \[7, 5\]"),
        ((g.bfloat16(), w.bfloat16(), d_hidden), "d_logits must be Float, got BFloat16"),
        ((g, w, d_hidden[:2]), r"out must have shape \[n, D\] = \[3, 5\], got \[2, 5\]"),
        ((g, w, d_hidden.double()), "out must be Float, got Double"),
        ((without_memory(g), w, d_hidden), "d_logits must have memory"),
    ):
        with pytest.raises(ValueError, match=message):
            native.d_hidden_matmul(*arguments)
    for arguments, message in (
        ((g, h.double(), d_weight, True), "hidden must have a dtype that"),
        ((g[0], h, d_weight, True), "d_logits must have two dimensions"),
        ((g[:2], h, d_weight, True), r"hidden must have shape \[n, D\] = \[2, 5\], got \[3, 5\]"),
        ((g.half(), h.half(), d_weight, True), "d_logits must be Float, got Half"),
        ((g, h, d_weight.t(), True), r"total must have shape \[V, D\] = \[7, 5\], got \[5, 7\]"),
        ((g, h, d_weight.half(), True), "total must be Float, got Half"),
        ((g, h, without_memory(d_weight), True), "total must have memory"),
    ):
        with pytest.raises(ValueError, match=message):
            native.d_weight_matmul(*arguments)


def test_says_where_matmuls_run() -> None:
    for dtype in (torch.float64, torch.int32):
        assert "matmuls take Float, BFloat16 or Half, not" in cpu.matmuls_unavailable(dtype)
    report = cpu.report()["matmuls"]
    if AVAILABLE:
        assert [cpu.matmuls_unavailable(dtype) for dtype in DTYPES] == [""] * 3
        variants = dict(variant.split(" by ") for variant in report.split(", "))
        assert list(variants) == ["float32", "bfloat16", "float16"]
        assert set(variants.values()) <= set(cpu.matmul_variants())
        assert [variants[dtype].split("-")[1] for dtype in variants] == [
            "fp32",
            cpu.matmul_arithmetic(torch.bfloat16),
            "fp32",
        ]
    else:
        reason = f"matmuls need the instruction set avx2 or avx512, this is {native.instruction_set()}"
        assert cpu.matmuls_unavailable(torch.bfloat16) == reason
        assert report == f"torch's own: {reason}"
        x = case(3, 5, 7, torch.float32)
        with pytest.raises(
            ValueError, match="weight must have a dtype that is multiplied on this machine: matmuls need"
        ):
            logits_of(x)


@pytest.mark.parametrize("name", native.compiled_instruction_sets())
def test_fresh_process_of_each_instruction_set(name: str) -> None:
    if name == native.instruction_set():
        pytest.skip("is the one that the rest of this file runs on")
    arguments = [sys.executable, "-m", "pytest", "-x", "--noconftest", "-k", "not fresh_process", __file__]
    environment = os.environ | {"UNIRL_CPU_ISA": name}
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    if f"UNIRL_CPU_ISA is {name}, which this machine does not support" in result.stdout + result.stderr:
        pytest.skip(f"this machine has no {name}, and the backend says so")
    assert result.returncode == 0, result.stdout[-3000:]


@needs_matmuls
def test_the_variant_that_is_forced_runs() -> None:
    for variant in cpu.matmul_variants():
        with cpu.forced_matmuls(variant):
            assert native.matmul_variant(torch.bfloat16) == variant
            assert native.matmul_variant(torch.float32) == variant.replace("bf16", "fp32")
            assert cpu.matmul_arithmetic(torch.bfloat16) == variant.split("-")[1]
    with pytest.raises(RuntimeError, match=r"UNIRL_CPU_MATMULS must be one that this machine has \(.*\), got brgemm"):
        native.force_matmuls("brgemm")


@needs_matmuls
@with_each_variant
def test_onednn_is_disabled_later() -> None:
    """Results are still right, or an error says that oneDNN must be enabled."""
    x = case(17, 33, 129, torch.bfloat16)
    expected = logits_of(x)
    with torch.backends.mkldnn.flags(enabled=False):
        if native.matmul_variant(torch.bfloat16) == "brgemm-bf16":
            with pytest.raises(RuntimeError, match=r"torch.backends.mkldnn must be enabled for .*; torch says: .*\Z"):
                logits_of(x)
        else:
            assert_right("logits", logits_of(x), x)
    assert torch.equal(logits_of(x), expected)


@needs_matmuls
@with_each_variant
def test_matmuls_of_torch_run_on_the_same_threads() -> None:
    """On AMX torch's matmuls would crash if the tiles were still configured for this package's."""
    x = case(64, 96, 512, torch.bfloat16)
    hidden, weight = torch.randn(70, 100).bfloat16(), torch.randn(100, 210).bfloat16()
    for n in (1, 2):
        with threads(n):
            expected = torch.mm(hidden, weight)
            for matmul in MATMULS.values():
                got = matmul(x)
                assert torch.equal(torch.mm(hidden, weight), expected)
                assert torch.equal(matmul(x), got)


def variants_of(**environment: str) -> tuple[list[str], str]:
    """Of a fresh process: ``matmul_variants`` and what is said of the backend."""
    code = (
        "import json, torch; from unirl_kernels.backends import cpu; cpu_ = torch.device('cpu');"
        "why = cpu.unavailable(cpu_); print(json.dumps(['' if why else cpu.report()['matmuls'], why or '']));"
        "print(json.dumps([] if why else cpu.matmul_variants()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    said, variants = (json.loads(line) for line in result.stdout.splitlines())
    return variants, said[0] or said[1]


@needs_matmuls
def test_fresh_process_without_brgemm() -> None:
    """Where oneDNN may not multiply bf16, and in bf16 there is no brgemm, the panels do it."""
    variants, said = variants_of(ONEDNN_MAX_CPU_ISA="AVX2")
    assert "brgemm-bf16" not in variants
    assert "bfloat16 by panels" in said


@needs_matmuls
def test_fresh_process_with_a_variant_that_is_asked_for() -> None:
    assert "bfloat16 by panels-fp32" in variants_of(UNIRL_CPU_MATMULS="panels-fp32")[1]
    assert "UNIRL_CPU_MATMULS must be one that" in variants_of(UNIRL_CPU_MATMULS="amx")[1]
    assert "got panels-fp32" in variants_of(UNIRL_CPU_MATMULS="panels-fp32", UNIRL_CPU_ISA="baseline")[1]
