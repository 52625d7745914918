"""The native CPU kernels: every compiled instruction set, in numbers, in bits, and at the edges.

What this file asks of the kernels it asks in its own process with the instruction set that the machine would choose,
and again in fresh processes with each of the others forced (``test_fresh_process_*``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels.accuracy import condition_of, violations
from unirl_kernels.backends import ReadoutArgs, RowFields, RowGradients, RowStats, cpu, eager
from unirl_kernels.program import trace

if reason := cpu.unavailable(torch.device("cpu")):
    raise RuntimeError(f"the cpu backend must run here: {reason}")
native = cpu._native()

IDENTITY = ReadoutArgs(1.0, None, 1.0, None)
READOUTS = {
    "identity": IDENTITY,
    "cold": ReadoutArgs(1.5, None, 0.3, None),
    "negative": ReadoutArgs(-0.8, None, 1.0, None),
    "softcap": ReadoutArgs(0.9, 5.0, 1.0, None),
    "rows": ReadoutArgs(1.0, None, 1.0, torch.tensor([[0.5, 1.0, 2.0]])),
    "softcap_rows": ReadoutArgs(-1.0, 30.0, 1.0, torch.tensor([[0.5, 1.0, 2.0]])),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEGMENT = native.SEGMENT
VOCABS = (1, 7, 16, 63, 64, 65, SEGMENT - 1, SEGMENT, SEGMENT + 1, 50257)
"""One word; less than a vector; around a step of each instruction set; around a segment; several and a rest."""

GRPO = trace(uk.grpo(clip=0.2, beta=0.04).objective)
PARAMS = torch.tensor(GRPO.params, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More than one where a test says so: waiting threads make small cases several times slower on a busy machine."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rows_of(dtype: torch.dtype, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(1, tokens, vocab) * 3).to(dtype), torch.randint(0, vocab, (1, tokens))


def fields_of(logits: Tensor, target: Tensor) -> RowFields:
    """Both signs of advantage, old and reference log-probabilities at a realistic distance."""
    logp = eager.token_stats(logits, target, IDENTITY).logp.double()
    noise = 0.2 * torch.randn(2, *target.shape)
    advantage = torch.randn(target.shape)
    fields = (torch.rand(target.shape) + 0.1, advantage, logp + noise[0], logp + noise[1])
    return RowFields(*(x.to(row_dtype(logits.dtype)) for x in fields))


def fused(logits: Tensor, target: Tensor, fields: RowFields, d_logits: Tensor | None = None) -> list[Tensor]:
    d_logits = cpu.empty(logits.shape, logits.dtype, logits.device) if d_logits is None else d_logits
    rows = cpu.fused_loss(logits, target, fields, IDENTITY, GRPO.program.encode(), PARAMS, d_logits, "rows")
    return [*rows, d_logits]


def naive(x: Tensor, target: Tensor, readout: ReadoutArgs, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """Statistics and the gradient of their weighted sum, by autograd, in the dtype of x."""
    x = x.detach().requires_grad_()
    cap = readout.softcap
    z = x * readout.scale if cap is None else cap * torch.tanh(x * readout.scale / cap)
    row = readout.row_temperature
    z = z / (readout.temperature if row is None else row.to(x.dtype).unsqueeze(-1))
    log_p = torch.log_softmax(z, -1)
    stats = [log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)]
    value = sum((s * w.to(x.dtype)).sum() for s, w in zip(stats, weights, strict=True))
    return [s.detach() for s in stats], torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("readout", READOUTS)
def test_statistics_and_gradient(readout: str, dtype: torch.dtype) -> None:
    args = READOUTS[readout]
    own = args.row_temperature
    typed = args._replace(row_temperature=None if own is None else own.to(row_dtype(dtype)))
    for vocab in VOCABS:
        logits, target = rows_of(dtype, 3, vocab)
        weights = torch.randn(3, 1, 3, dtype=torch.float64)
        truth, d_truth = naive(logits.double(), target, args, weights)
        plain, d_plain = naive(logits.to(row_dtype(dtype)), target, args, weights)
        stats = cpu.token_stats(logits, target, typed)
        gradients = RowGradients(*weights.to(row_dtype(dtype)))
        d_logits = cpu.empty(logits.shape, logits.dtype, logits.device)
        cpu.token_stats_backward(logits, target, stats, gradients, typed, d_logits)
        scale = truth[2].abs().max().item()
        for name, x, p, t in zip(stats._fields, stats, plain, truth, strict=True):
            problems = violations(x, p, t, condition=condition_of(t, scale))
            assert not problems, f"V = {vocab}, {name}: {problems}"
        problems = violations(d_logits, d_plain.to(dtype), d_truth, condition=max(1.0, scale))
        assert not problems, f"V = {vocab}, gradient: {problems}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_loss_and_gradient(dtype: torch.dtype) -> None:
    code = GRPO.program.encode()
    for vocab in (7, 1000, SEGMENT + 3, 50257):
        logits, target = rows_of(dtype, 8, vocab)
        target[0, 3] = uk.IGNORE
        fields = fields_of(logits, target)
        exact = RowFields(*(x.double() for x in fields))
        got = fused(logits, target, fields)
        results = []
        for x, f in ((logits.to(row_dtype(dtype)), fields), (logits.double(), exact)):
            d_x = torch.empty_like(x)
            results.append([*eager.fused_loss(x, target, f, IDENTITY, code, PARAMS, d_x, "rows"), d_x])
        for name, x, p, t in zip(("loss", "logp", "entropy", "d_logits"), got, *results, strict=True):
            # An error of logp reaches loss and gradient through the ratio.
            problems = violations(x, p.to(x.dtype), t, condition=2 * results[1][1].abs().max().item())
            assert not problems, f"V = {vocab}, {name}: {problems}"
        assert not any(x[0, 3].any() for x in got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    logits, target = rows_of(dtype, 4, 3000)
    fields = fields_of(logits, target)
    fields = fields._replace(weight=1000 * fields.weight)
    *_, rounded = fused(logits, target, fields)
    *_, exact = fused(logits.float(), target, fields)
    last_place = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    off = (rounded.double() - exact.double()).abs() / last_place.clamp(min=subnormal)
    assert off.max() < 0.53
    assert off.mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 30.0])
def test_the_exponential(temperature: float) -> None:
    """With lse = 0 and d_lse = 1 the gradient is e^z / temperature: relative error within 2e-7 down to e^-87."""
    readout = IDENTITY._replace(temperature=temperature)
    x = torch.linspace(-87 * temperature, 0, 200_001).view(1, 1, -1)
    zero, target = torch.zeros(1, 1), torch.tensor([[x.numel() - 1]])
    d_x = torch.empty_like(x)
    gradients = RowGradients(None, None, torch.full((1, 1), temperature))
    cpu.token_stats_backward(x, target, RowStats(zero, zero, zero), gradients, readout, d_x)
    truth = (x.double() / temperature).exp()
    assert ((d_x - truth) / truth).abs().max() < 2e-7
    assert d_x[0, 0, -1] == 1
    far = torch.tensor([[[0.0, -90.0, -1000.0]]]) * temperature
    cpu.token_stats_backward(far, zero.long(), RowStats(zero, zero, zero), gradients, readout, far)
    assert not far[0, 0, 1:].any()


def test_gradients_do_not_depend_on_a_shift() -> None:
    """All logits 1000 higher: lse has lost three digits, the gradient none."""
    logits, target = rows_of(torch.float32, 3, 5000)
    logits = (logits * 2**10).round() / 2**10
    weights = torch.randn(3, 1, 3)
    results = []
    for x in (logits, logits + 1000):
        d_x = torch.empty_like(x)
        stats = cpu.token_stats(x, target, IDENTITY)
        cpu.token_stats_backward(x, target, stats, RowGradients(*weights), IDENTITY, d_x)
        results.append(d_x)
    assert (results[0] - results[1]).norm() < 2e-6 * results[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logp_to_two_millionths(dtype: torch.dtype) -> None:
    for vocab in (32000, 151936, 262208):
        logits, target = rows_of(dtype, 9, vocab)
        logits[0, 0, target[0, 0]] = 30
        # Sums of like numbers: their rounding errors have one sign.
        logits[0, 1:5] = torch.linspace(-3, -0.4, 4).unsqueeze(-1)
        logits[0, 1:5, ::SEGMENT] = 0
        truth = torch.log_softmax(logits.double(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        error = (cpu.token_stats(logits, target, IDENTITY).logp.double() - truth).abs().max().item()
        assert error < 2e-6, f"V = {vocab}: {error}"


def test_a_certain_target_keeps_its_gradient() -> None:
    """p_y -> 1: plain fp32 loses 1 - p_y altogether, the kernel keeps it to a percent."""
    logits, target = rows_of(torch.float32, 1, 50257)
    logits[0, 0, target[0, 0]] = logits.max() + 25
    ones, none = torch.ones(1, 1), RowGradients(torch.ones(1, 1), None, None)
    x = logits.double().requires_grad_()
    (truth,) = torch.autograd.grad(torch.log_softmax(x, -1)[0, 0, target[0, 0]], x)
    d_logits = torch.empty_like(logits)
    cpu.token_stats_backward(logits, target, cpu.token_stats(logits, target, IDENTITY), none, IDENTITY, d_logits)
    at = (0, 0, int(target))
    assert abs(truth[at]) < 1e-7
    assert d_logits[at].item() == pytest.approx(truth[at].item(), rel=1e-2)
    code = trace(uk.sft().objective)
    fields, params = RowFields(ones, None, None, None), torch.tensor(code.params, dtype=torch.float64)
    cpu.fused_loss(logits, target, fields, IDENTITY, code.program.encode(), params, d_logits, "rows")
    assert d_logits[at].item() == pytest.approx(-truth[at].item(), rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_row_s_own(dtype: torch.dtype) -> None:
    """One or two threads, whole rows or split ones, any place in memory, any neighbours, in place or not."""
    vocab = 5 * SEGMENT + 77
    logits, target = rows_of(dtype, 16, vocab)
    target[0, 5] = uk.IGNORE
    fields = fields_of(logits, target)
    torch.set_num_threads(2)
    whole = fused(logits, target, fields)
    stats = cpu.token_stats(logits, target, IDENTITY)
    gradients = RowGradients(*torch.randn(3, 1, 16, dtype=stats.logp.dtype))

    def check(rows: slice, x: Tensor, in_place: bool = False) -> None:
        own = RowFields(*(f[:, rows].contiguous() for f in fields))
        before = cpu.token_stats(x, target[:, rows].contiguous(), IDENTITY)
        d_x = torch.empty_like(logits[:, rows])
        own_gradients = RowGradients(*(g[:, rows].contiguous() for g in gradients))
        cpu.token_stats_backward(x, target[:, rows].contiguous(), before, own_gradients, IDENTITY, d_x)
        got = fused(x, target[:, rows].contiguous(), own, x if in_place else None)
        for a, b in zip((*whole, *stats, reference), (*got, *before, d_x), strict=True):
            assert torch.equal(a[:, rows], b)

    reference = cpu.empty(logits.shape, logits.dtype, logits.device)
    cpu.token_stats_backward(logits, target, stats, gradients, IDENTITY, reference)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (slice(0, 16), slice(4, 5), slice(4, 7), slice(15, 16)):
            check(rows, logits[:, rows])
        for shift in (1, 3):
            moved = torch.empty(16 * (vocab + 5) + shift, dtype=dtype)[shift:].view(1, 16, vocab + 5)[..., :vocab]
            check(slice(0, 16), moved.copy_(logits))
            check(slice(0, 16), moved, in_place=True)


def test_padded_layout_takes_any_strides() -> None:
    buffer = torch.randn(7, 5, 3, 300)
    logits = buffer[1:, :, 1, :250].transpose(0, 1)
    target = torch.randint(0, 250, (5, 6))
    before = buffer.clone()
    fields = fields_of(logits, target)
    expected = fused(logits.contiguous(), target, fields)
    got = fused(logits, target, fields, logits)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    buffer[1:, :, 1, :250] = before[1:, :, 1, :250]
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_masked_logits(scale: float, dtype: torch.dtype) -> None:
    """-inf is probability 0: nothing in the entropy, exactly zero gradient, whole segments of it included."""
    readout = IDENTITY._replace(scale=scale)
    vocab = 2 * SEGMENT + 100
    logits, target = rows_of(dtype, 4, vocab)
    kept = torch.zeros(4, vocab, dtype=torch.bool)
    kept[0, :5], kept[1, -3:], kept[2, 7], kept[3, ::2] = True, True, True, True
    target[0] = torch.tensor([3, vocab - 1, 7, SEGMENT])
    logits[0] = logits[0].masked_fill(~kept, -scale * torch.inf)
    weights = torch.randn(3, 1, 4, dtype=row_dtype(dtype))
    stats = cpu.token_stats(logits, target, readout)
    d_logits = cpu.empty(logits.shape, logits.dtype, logits.device)
    cpu.token_stats_backward(logits, target, stats, RowGradients(*weights), readout, d_logits)
    assert not d_logits[0][~kept].any()
    for row in range(4):
        short, index = logits[:, row : row + 1, kept[row]], kept[row].nonzero().squeeze(-1)
        place = (index == target[0, row]).nonzero()
        own = weights[:, :, row, None]
        truth, d_truth = naive(short.double(), place, readout, own)
        plain, d_plain = naive(short.to(row_dtype(dtype)), place, readout, own)
        for x, p, t in zip(stats, plain, truth, strict=True):
            assert not violations(x[:, row : row + 1], p, t, condition=10)
        assert not violations(d_logits[:, row : row + 1, index], d_plain.to(dtype), d_truth, condition=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_distribution(dtype: torch.dtype) -> None:
    """NaN, +inf or nothing but -inf in a row, or a target that is no word: NaN in all of that row, and only there."""
    vocab = SEGMENT + 100
    logits, target = rows_of(dtype, 8, vocab)
    logits[0, 1, 17] = torch.nan
    logits[0, 2, vocab - 1] = torch.inf
    logits[0, 3] = -torch.inf
    target[0, 4], target[0, 5], target[0, 6] = vocab, -1, uk.IGNORE
    logits[0, 6] = torch.nan
    fields = fields_of(torch.randn(1, 8, vocab), target.clamp(0, vocab - 1))
    fields = RowFields(*(x.to(row_dtype(dtype)) for x in fields))
    stats = cpu.token_stats(logits, target, IDENTITY)
    *rows, d_logits = fused(logits, target, fields)
    broken = torch.tensor([False, True, True, True, True, True, False, False])
    for x in (stats.logp, stats.entropy, *rows):
        assert torch.equal(x[0].isnan(), broken)
    assert torch.equal(d_logits[0].isnan(), broken.unsqueeze(-1).expand(8, vocab))
    assert not any(x[0, 6].any() for x in (*stats, *rows, d_logits))


def test_temperatures_that_are_not_positive_give_nan() -> None:
    logits, target = rows_of(torch.float32, 3, 100)
    readout = IDENTITY._replace(row_temperature=torch.tensor([[1.0, 0.0, -1.0]]))
    stats = cpu.token_stats(logits, target, readout)
    assert torch.equal(stats.logp.isnan(), torch.tensor([[False, True, True]]))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts resident pages as Linux reports them")
def test_more_than_two_to_the_31_logits() -> None:
    """Row offsets beyond 32 bits; rows that are ignored are not read, or their memory would become resident."""
    vocab, tokens = 151936, 14200
    memory = torch.empty(tokens * vocab, dtype=torch.bfloat16)
    assert memory.numel() > 2**31
    logits = memory.view(1, tokens, vocab)
    target = torch.full((1, tokens), uk.IGNORE)
    used = torch.tensor([0, 7000, tokens - 1])
    words = torch.tensor([[1, 77, vocab - 1]])
    target[:, used] = words
    logits[0, used] = torch.randn(3, vocab).bfloat16()
    before = resident_bytes()
    stats = cpu.token_stats(logits, target, IDENTITY)
    assert resident_bytes() - before < 64 * 2**20
    few = logits[:, used].contiguous()
    alone = cpu.token_stats(few, words, IDENTITY)
    for x, y in zip(stats, alone, strict=True):
        assert torch.equal(x[:, used], y)
        assert x.count_nonzero() == 3
    far = memory.as_strided((1, 3, vocab), (0, (tokens - 1) // 2 * vocab, 1))
    far.copy_(few)
    fields = fields_of(few, words)
    for x, y in zip(fused(few, words, fields), fused(far, words, fields, far), strict=True):
        assert torch.equal(x, y)


def test_runs_on_the_instruction_set_that_was_asked_for() -> None:
    forced = os.environ.get("UNIRL_CPU_ISA")
    report = cpu.report()
    assert report["instruction set"] == (forced or native.instruction_set())
    assert report["compiled"].split(", ")[-1] == "baseline"


def this_file_in_a_fresh_process(instruction_set: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "pytest", "-x", "--noconftest", "-k", "not fresh_process", __file__]
    environment = os.environ | {"UNIRL_CPU_ISA": instruction_set}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("name", native.compiled_instruction_sets())
def test_fresh_process_of_each_instruction_set(name: str) -> None:
    if name == native.instruction_set():
        pytest.skip("is the one that the rest of this file runs on")
    result = this_file_in_a_fresh_process(name)
    if f"UNIRL_CPU_ISA is {name}, which this machine does not support" in result.stdout:
        pytest.skip(f"this machine has no {name}, and the backend says so")
    assert result.returncode == 0, result.stdout[-3000:]
