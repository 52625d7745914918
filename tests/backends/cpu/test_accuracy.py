"""The native CPU kernels in numbers: statistics, losses and gradients against fp64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch

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
    program_of,
    row_dtype,
    rows_of,
    z_of,
)
from tests.observed import check
from unirl_kernels.backends import cpu, eager, load, moments
from unirl_kernels.backends.groups import ELSEWHERE, ProgramArgs, ReadoutArgs, RowGradients, RowMoments
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import weight_name
from unirl_kernels.testing.budgets import condition_of, violations

VOCABS = (1, 7, 16, 63, 64, 65, SEGMENT - 1, SEGMENT, SEGMENT + 1, 50257)
"""One column; less than a vector; around a step of each instruction set; around a segment; several and a rest."""


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
        stats, found = cpu.token_stats(logits, target, typed)
        gradients = RowGradients(*weights.to(row_dtype(dtype)))
        d_logits = cpu.empty(logits.shape, logits.dtype, logits.device)
        cpu.token_stats_backward(logits, target, typed, found, gradients, d_logits)
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
        stats, of_row, found = cpu.token_observations(logits, target, typed)
        z = (z_of(logits.double(), args), z_of(logits.to(row_dtype(dtype)), args))
        check(found, logits, target, *z, args.scale)
        signed = logits if args.scale > 0 else -logits
        assert torch.equal(found.largest, signed.amax(-1).to(row_dtype(dtype)))
        measured = cpu.token_stats(logits, target, typed)
        for x, y in zip((*measured.stats, *measured.moments), (*stats, *of_row), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_first_maximum_wins(scale: float, dtype: torch.dtype) -> None:
    """Twice in a step, in two steps, in two segments; in the last logits, which are filled up to a step."""
    vocab = 2 * SEGMENT + 7
    columns = [
        (4, 5),
        (5, 6),
        (31, 32),
        (60, 70),
        (9, SEGMENT),
        (SEGMENT - 1, SEGMENT),
        (SEGMENT + 90, 2 * SEGMENT + 1),
    ]
    columns += [(2 * SEGMENT + i, vocab - 1) for i in range(7)]
    logits = -scale * torch.rand(1, len(columns), vocab).to(dtype)
    for row, pair in zip(logits[0], columns, strict=True):
        row[list(pair)] = 2 * scale
    target = torch.zeros(1, len(columns), dtype=torch.int64)
    found = cpu.token_observations(logits, target, IDENTITY._replace(scale=scale)).observations
    assert found.argmax[0].tolist() == [first for first, _ in columns]


@pytest.mark.parametrize("name", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_equal_logits_of_any_size(scale: float, dtype: torch.dtype, name: str) -> None:
    """p is 1 / V however large the equal logits are, although an lse of their size loses log V."""
    largest, backend, readout = torch.finfo(dtype).max, load(name), IDENTITY._replace(scale=scale)
    target, one = torch.tensor([[2]]), torch.ones(1, 1, dtype=row_dtype(dtype))
    sft = program_of(lambda t: -t.logp, one)
    for value in (-largest, -3e4, 0.0, 3e4, min(1e12, largest), min(1e30, largest)):
        logits = torch.full((1, 1, 4), value, dtype=dtype)
        one_pass, two_passes = torch.empty_like(logits), torch.empty_like(logits)
        backend.fused_loss(logits, target, readout, sft, one_pass, backend.KERNELS[0])
        found = backend.token_stats(logits, target, readout).moments
        backend.token_stats_backward(logits, target, readout, found, RowGradients(-one, None, None), two_passes)
        for gradient in (one_pass, two_passes):
            torch.testing.assert_close(gradient[0], scale * logits.new_tensor([[0.25, 0.25, -0.75, 0.25]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_loss_and_gradient(dtype: torch.dtype) -> None:
    for vocab in (7, 1000, SEGMENT + 3, 50257):
        logits, target = rows_of(dtype, 8, vocab)
        target[0, 3] = IGNORE
        fields = fields_of(logits, target)
        got = fused(logits, target, fields)
        results = []
        for x in (logits.to(row_dtype(dtype)), logits.double()):
            d_x = torch.empty_like(x)
            program = ProgramArgs(GRPO.text, fields.to(x.dtype), PARAMS)
            results.append([*eager.fused_loss(x, target, IDENTITY, program, d_x, "rows"), d_x])
        for name, x, p, t in zip(("loss", "logp", "entropy", "lse", "d_logits"), got, *results, strict=True):
            # An error of logp reaches loss and gradient through the ratio.
            problems = violations(x, p.to(x.dtype), t, condition=2 * results[1][1].abs().max().item())
            assert not problems, f"V = {vocab}, {name}: {problems}"
        assert not any(x[0, 3].any() for x in got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    logits, target = rows_of(dtype, 4, 3000)
    fields = fields_of(logits, target)
    fields[GRPO.fields.index(weight_name(0))] *= 1000
    *_, rounded = fused(logits, target, fields)
    *_, exact = fused(logits.float(), target, fields)
    last_place = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    off = (rounded.double() - exact.double()).abs() / last_place.clamp(min=subnormal)
    assert off.max() < 0.53
    assert off.mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 30.0])
def test_the_exponential(temperature: float) -> None:
    """With top = 0, s = 1 and d_lse = 1 the gradient is e^z / temperature: relative error within 2e-7 to e^-87."""
    readout = IDENTITY._replace(temperature=temperature)
    x = torch.linspace(-87 * temperature, 0, 200_001).view(1, 1, -1)
    zero, target = torch.zeros(1, 1), torch.tensor([[x.numel() - 1]])
    d_x = torch.empty_like(x)
    found = RowMoments(zero, zero, zero, zero)
    gradients = RowGradients(None, None, torch.full((1, 1), temperature))
    cpu.token_stats_backward(x, target, readout, found, gradients, d_x)
    truth = (x.double() / temperature).exp()
    assert ((d_x - truth) / truth).abs().max() < 2e-7
    assert d_x[0, 0, -1] == 1
    far = torch.tensor([[[0.0, -90.0, -1000.0]]]) * temperature
    cpu.token_stats_backward(far, zero.long(), readout, found, gradients, far)
    assert not far[0, 0, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.37, 30.0])
def test_the_exponential_of_sums(temperature: float, dtype: torch.dtype) -> None:
    """Of two logits one is 0: s - 1 is e^z, sz is z e^z. At 0.37 and 30 AVX-512 does not step by one float."""
    z = torch.linspace(-20, -1e-3, 20_001)
    logits = torch.stack([torch.zeros_like(z), z * temperature], -1).unsqueeze(0).to(dtype)
    readout = IDENTITY._replace(temperature=temperature)
    found = cpu.token_stats(logits, torch.zeros(1, len(z), dtype=torch.int64), readout).moments
    exact = logits[..., 1].double() / temperature
    for x, truth, allowed in ((found.s_minus_1, exact.exp(), 2.2e-7), (found.sz, exact * exact.exp(), 2.7e-7)):
        assert ((x - truth) / truth).abs().max() < allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_largest_of_logits_of_16_bits(scale: float, dtype: torch.dtype) -> None:
    """Logits of 16 bits are compared as integers: both signs, zeros, NaN and inf, in whole steps and in the rest."""
    vocab = SEGMENT + 7
    base = torch.rand(vocab) * 8
    rows = [base, -base - 1, base - 4, torch.zeros(vocab), -torch.zeros(vocab), base - 200, base * 12]
    for value in (torch.inf, -torch.inf, torch.nan, -torch.tensor(torch.nan), -0.0, 200.0):
        for at in (5, SEGMENT - 1, vocab - 1):
            for sign in (1, -1):
                rows.append((base + 1) * sign)
                rows[-1][at] = value
    rows.append(torch.full((vocab,), -scale * torch.inf))
    logits = torch.stack(rows).unsqueeze(1).to(dtype)
    target = torch.full((len(rows), 1), 3)
    readout = IDENTITY._replace(scale=scale)
    ours, wide = (cpu.token_stats(x, target, readout) for x in (logits, logits.float()))
    assert torch.equal(ours.moments.top.nan_to_num(9e9), wide.moments.top.nan_to_num(9e9))
    for x, y in zip((*ours.stats, *ours.moments), (*wide.stats, *wide.moments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_gradients_do_not_depend_on_a_shift() -> None:
    """With all logits increased by 1000, lse loses three digits, but the gradient keeps the same bits."""
    logits, target = rows_of(torch.float32, 3, 5000)
    logits = (logits * 2**10).round() / 2**10
    weights = torch.randn(3, 1, 3)
    results = []
    for x in (logits, logits + 1000):
        d_x = torch.empty_like(x)
        found = cpu.token_stats(x, target, IDENTITY).moments
        cpu.token_stats_backward(x, target, IDENTITY, found, RowGradients(*weights), d_x)
        results.append(d_x)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logp_to_two_millionths(dtype: torch.dtype) -> None:
    for vocab in (32000, 151936, 262208):
        logits, target = rows_of(dtype, 9, vocab)
        logits[0, 0, target[0, 0]] = 30
        # Sums of like numbers: their rounding errors have one sign.
        logits[0, 1:5] = torch.linspace(-3, -0.4, 4).unsqueeze(-1)
        logits[0, 1:5, ::SEGMENT] = 0
        truth = torch.log_softmax(logits.double(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        error = (cpu.token_stats(logits, target, IDENTITY).stats.logp.double() - truth).abs().max().item()
        assert error < 2e-6, f"V = {vocab}: {error}"


def test_a_certain_target_keeps_its_gradient() -> None:
    """p_y -> 1: plain fp32 loses 1 - p_y altogether, the kernel keeps it to a percent."""
    logits, target = rows_of(torch.float32, 1, 50257)
    logits[0, 0, target[0, 0]] = logits.max() + 25
    ones = torch.ones(1, 1)
    x = logits.double().requires_grad_()
    (truth,) = torch.autograd.grad(torch.log_softmax(x, -1)[0, 0, target[0, 0]], x)
    d_logits = torch.empty_like(logits)
    found = cpu.token_stats(logits, target, IDENTITY).moments
    cpu.token_stats_backward(logits, target, IDENTITY, found, RowGradients(ones, None, None), d_logits)
    at = (0, 0, int(target))
    assert abs(truth[at]) < 1e-7
    assert d_logits[at].item() == pytest.approx(truth[at].item(), rel=1e-2)
    cpu.fused_loss(logits, target, IDENTITY, program_of(lambda t: -t.logp, ones), d_logits, "rows")
    assert d_logits[at].item() == pytest.approx(-truth[at].item(), rel=1e-2)


@pytest.mark.parametrize("mask", [-1e4, -1e9])
def test_a_finite_mask_in_a_target(mask: float) -> None:
    """Two passes; the saturated target does not disturb the gradients of its neighbours."""
    target = torch.randint(4, 50, (2, 3))
    logits = torch.randn(2, 3, 50) * 2
    logits[0, 1, target[0, 1]] = mask
    results = []
    for x, backend in ((logits, cpu), (logits, eager), (logits.double(), eager)):
        d_x = torch.empty_like(x)
        found = backend.token_stats(x, target, IDENTITY).moments
        gradients = RowGradients(torch.ones(2, 3, dtype=x.dtype), None, None)
        backend.token_stats_backward(x, target, IDENTITY, found, gradients, d_x)
        results.append(d_x)
    assert results[2].abs().amax(-1).min() > 0.01
    assert not (problems := violations(*results)), problems


@pytest.mark.parametrize("vocab", [2, 4, 70])
def test_the_target_is_the_largest_to_the_bit(vocab: int) -> None:
    """Its tanh is taken by itself. Where it was rounded in another way than in the row, logp was off by kappa ulps."""
    gaps = torch.linspace(1, 40, 4000)
    logits = torch.zeros(1, 4000, vocab)
    logits[0, :, 1] = gaps
    target = torch.ones(1, 4000, dtype=torch.int64)
    readout = ReadoutArgs(1.0, 30.0, 0.1, None)
    program = program_of(lambda t: -t.logp, torch.ones(1, 4000, dtype=torch.float64))
    program = program._replace(fields=program.fields.float())
    fused = cpu.fused_loss(logits, target, readout, program, torch.empty_like(logits), "rows")
    exact = torch.log_softmax(z_of(logits.double(), readout), -1)[..., 1]
    for logp in (cpu.token_stats(logits, target, readout).stats.logp, fused.logp):
        # A difference of z is right to four ulps of kappa, which counts as much as 1 - p_y; a sum that is 1 to two.
        eps = torch.finfo(torch.float32).eps
        allowed = 4 * eps * (300 * -torch.expm1(exact) + exact.abs()) + 2 * eps
        assert ((logp.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("softcap", [5.0, 30.0])
def test_log_probabilities_are_not_positive(softcap: float) -> None:
    """With a softcap the target's u and the row's largest may be rounded differently, by tens of kappa."""
    logits = torch.randn(1, 20000, 3) * 3
    target = logits.argmax(-1)
    readout = ReadoutArgs(3.0, softcap, 0.1, None)
    stats, found = cpu.token_stats(logits, target, readout)
    d_logits = torch.empty_like(logits)
    weight = torch.ones(1, 20000)
    rows = cpu.fused_loss(logits, target, readout, program_of(lambda t: -t.logp, weight), d_logits, "rows")
    for x in (stats, rows):
        assert (x.logp <= 0).all()
        assert (x.entropy >= 0).all()
    # -(1 - p_y), times a slope that is not negative.
    assert (d_logits.gather(-1, target.unsqueeze(-1)) <= 0).all()
    cpu.token_stats_backward(logits, target, readout, found, RowGradients(weight, None, None), d_logits)
    assert (d_logits.gather(-1, target.unsqueeze(-1)) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("readout", READOUTS)
def test_shards(readout: str, dtype: torch.dtype) -> None:
    """Columns of a row in three calls: their moments merge into the row's, and the gradient of each has all digits."""
    args, vocab = READOUTS[readout], SEGMENT + 700
    own = args.row_temperature
    typed = args._replace(row_temperature=None if own is None else own.to(row_dtype(dtype)))
    logits, target = rows_of(dtype, 3, vocab)
    logits[0, 0, :50] = -args.scale * torch.inf  # a shard without a finite logit
    target[0] = torch.tensor([60, vocab - 1, 2000])
    shards = [slice(0, 50), slice(50, 5000), slice(5000, vocab)]
    weights = torch.randn(3, 1, 3, dtype=torch.float64)
    z, kappa = z_of(logits.to(row_dtype(dtype)), typed), kappa_of(typed).to(row_dtype(dtype))

    def targets(shard: slice) -> torch.Tensor:
        here = (target >= shard.start) & (target < shard.stop)
        return torch.where(here, target - shard.start, ELSEWHERE)

    parts = [cpu.token_stats(logits[..., shard], targets(shard), typed) for shard in shards]
    for part, shard in zip(parts, shards, strict=True):
        elsewhere = targets(shard) == ELSEWHERE
        assert (part.moments.u_target[elsewhere] == -torch.inf).all()
        expected = z[..., shard].logsumexp(-1)
        torch.testing.assert_close(part.stats.lse, expected, rtol=1e-5, atol=1e-5)
    merged = moments.merge(RowMoments(*map(torch.stack, zip(*(p.moments for p in parts), strict=True))), kappa)
    finite = logits.clamp(-1e4, 1e4)  # 0 times -inf in the naive entropy is NaN
    truth, d_truth = naive(finite.double(), target, args, weights)
    plain, d_plain = naive(finite.to(row_dtype(dtype)), target, args, weights)
    for x, p, t in zip(moments.statistics(merged, kappa), plain, truth, strict=True):
        problems = violations(x, p, t, condition=condition_of(t, truth[2].abs().max().item()))
        assert not problems, problems
    d_logits = torch.full_like(logits, torch.nan)
    gradients = RowGradients(*weights.to(row_dtype(dtype)))
    for shard in shards:
        cpu.token_stats_backward(logits[..., shard], targets(shard), typed, merged, gradients, d_logits[..., shard])
    problems = violations(d_logits, d_plain.to(dtype), d_truth, condition=max(1.0, truth[2].abs().max().item()))
    assert not problems, problems


def kappa_of(readout: ReadoutArgs) -> torch.Tensor:
    row = readout.row_temperature
    temperature = torch.tensor(readout.temperature, dtype=torch.float64) if row is None else row.double()
    return (abs(readout.scale) if readout.softcap is None else readout.softcap) / temperature


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_has_the_bias_of_its_rounding_alone(dtype: torch.dtype) -> None:
    """The error of a short polynomial has no bias."""
    logits, target = torch.randn(48, 1, 50257).to(dtype), torch.zeros(48, 1, dtype=torch.long)
    stats, found = cpu.token_stats(logits, target, IDENTITY)
    d_logits = cpu.empty(logits.shape, dtype, logits.device)
    gradients = RowGradients(torch.ones_like(stats.logp), None, None)
    cpu.token_stats_backward(logits, target, IDENTITY, found, gradients, d_logits)
    _, truth = naive(logits.double(), target, IDENTITY, torch.tensor([1.0, 0, 0]).double().view(3, 1, 1))
    _, plain = naive(logits.float(), target, IDENTITY, torch.tensor([1.0, 0, 0]).double().view(3, 1, 1))
    ours, eager_ones = (x[..., 1:].double() - truth[..., 1:] for x in (d_logits, plain.to(dtype)))
    # Roundings are independent: the standard error of their sum is their norm.
    assert abs(ours.sum()) <= 2 * abs(eager_ones.sum()) + 4 * ours.norm(), f"{ours.sum():.2g} {eager_ones.sum():.2g}"


def test_double_sums_lose_no_more_than_eager_ones() -> None:
    """Against sums in the width of the machine's long double, of rows with many logits of one size."""
    for logits in (torch.randn(4, 8192, dtype=torch.float64) * 2, torch.rand(4, 50257, dtype=torch.float64)):
        wide = logits.numpy().astype(numpy.longdouble)
        d = wide - wide.max(-1, keepdims=True)
        e = numpy.exp(d)
        entropy = numpy.log(e.sum(-1)) - (e * d).sum(-1) / e.sum(-1)
        stats, _ = cpu.token_stats(logits.unsqueeze(1), torch.zeros(4, 1, dtype=torch.long), IDENTITY)
        log_p = torch.log_softmax(logits, -1)
        ours, plain = (abs(x.numpy() - entropy).max() for x in (stats.entropy[:, 0], -(log_p.exp() * log_p).sum(-1)))
        assert ours <= plain + numpy.finfo(numpy.float64).eps * entropy.max()
