"""The native CPU kernels in numbers: statistics, losses and gradients against fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import unirl_kernels as uk
from tests.backends.cpu.rows import (
    DTYPES,
    GRPO,
    IDENTITY,
    PARAMS,
    READOUTS,
    SEGMENT,
    fields_of,
    fused,
    naive,
    one_thread,
    row_dtype,
    rows_of,
    z_of,
)
from tests.observed import check
from unirl_kernels.backends import RowFields, RowGradients, RowStats, cpu, eager
from unirl_kernels.program import trace
from unirl_kernels.testing.budgets import condition_of, violations

VOCABS = (1, 7, 16, 63, 64, 65, SEGMENT - 1, SEGMENT, SEGMENT + 1, 50257)
"""One word; less than a vector; around a step of each instruction set; around a segment; several and a rest."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


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
@pytest.mark.parametrize("readout", READOUTS)
def test_observations(readout: str, dtype: torch.dtype) -> None:
    args = READOUTS[readout]
    own = args.row_temperature
    typed = args._replace(row_temperature=None if own is None else own.to(row_dtype(dtype)))
    for vocab in VOCABS:
        logits, target = rows_of(dtype, 3, vocab)
        logits[0, 2, 3::50] = 12 if args.scale > 0 else -12  # ties
        found = cpu.token_observations(logits, target, typed)
        z = (z_of(logits.double(), args), z_of(logits.to(row_dtype(dtype)), args))
        check(found, logits, target, *z, args.scale)
        signed = logits if args.scale > 0 else -logits
        assert torch.equal(found.largest, signed.amax(-1).to(row_dtype(dtype)))
        for x, y in zip(cpu.token_stats(logits, target, typed), found, strict=False):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_first_maximum_wins(scale: float, dtype: torch.dtype) -> None:
    """Twice in a step, in two steps, in two segments; in the last logits, which are filled up to a step."""
    vocab = 2 * SEGMENT + 7
    places = [(4, 5), (5, 6), (31, 32), (60, 70), (9, SEGMENT), (SEGMENT - 1, SEGMENT), (SEGMENT + 90, 2 * SEGMENT + 1)]
    places += [(2 * SEGMENT + i, vocab - 1) for i in range(7)]
    logits = -scale * torch.rand(1, len(places), vocab).to(dtype)
    for row, pair in zip(logits[0], places, strict=True):
        row[list(pair)] = 2 * scale
    target = torch.zeros(1, len(places), dtype=torch.int64)
    found = cpu.token_observations(logits, target, IDENTITY._replace(scale=scale))
    assert found.argmax[0].tolist() == [first for first, _ in places]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_equal_logits_of_any_size(scale: float, dtype: torch.dtype, backend: str) -> None:
    """p is 1 / V however large they are; in an lse of their size log V is lost."""
    largest, plan = torch.finfo(dtype).max, uk.Plan(backend=backend)
    for value in (-largest, -3e4, 0.0, 3e4, min(1e12, largest), min(1e30, largest)):
        logits = torch.full((1, 1, 4), value, dtype=dtype)
        leaf = logits[0].requires_grad_()
        readout, target = uk.Readout(scale=scale), torch.tensor([[2]])
        loss = uk.fused_loss(leaf[None], uk.Batch(target), uk.sft(), readout=readout, plan=plan).loss
        logp = uk.token_stats(leaf, target[0], readout=readout, plan=plan).logp
        for result in (loss, -logp.sum()):
            (gradient,) = torch.autograd.grad(result, leaf)
            torch.testing.assert_close(gradient, scale * logits.new_tensor([[0.25, 0.25, -0.75, 0.25]]))


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


@pytest.mark.parametrize("mask", [-1e4, -1e9])
def test_a_finite_mask_in_a_chosen_answer(mask: float) -> None:
    """DPO's gradient comes of two passes; the saturated pair pulls every token of the chosen answer alike."""
    target = torch.randint(4, 50, (2, 3))
    logits = torch.randn(2, 3, 50) * 2
    logits[0, 1, target[0, 1]] = mask
    batch = uk.Batch(target, ref_logp=torch.full(target.shape, -4.0))
    results = []
    for x, backend in ((logits, "cpu"), (logits, "eager"), (logits.double(), "eager")):
        leaf = x.detach().requires_grad_()
        loss = uk.fused_loss(leaf, batch, uk.dpo(), plan=uk.Plan(backend=backend)).loss
        results.append(torch.autograd.grad(loss, leaf)[0])
    assert results[2].abs().amax(-1).min() > 0.01
    assert not (problems := violations(*results)), problems
