"""The Triton kernels: every path of a row, against naive PyTorch in fp64. Interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.triton.rows import (
    BACKEND,
    DEVICE,
    PLAIN,
    READOUTS,
    RESULTS,
    WEIGHT,
    Rows,
    check,
    check_all,
    check_one_pass,
    clipped_with_kl,
    make_program,
    make_rows,
    naive,
    run,
    with_entropy,
)
from unirl_kernels.backends.groups import ELSEWHERE, ProgramArgs, ReadoutArgs, RowGradients, RowMoments
from unirl_kernels.backends.moments import merge, statistics
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import ZERO, Op, Program, trace
from unirl_kernels.program.ir import Instruction

KERNELS = pytest.mark.parametrize("kernel", BACKEND.KERNELS)

VOCABULARIES = [
    (1, torch.float32, "log p = 0, no gradient"),
    (7, torch.float32, "below any vector"),
    (511, torch.float32, "one below the tile of one warp"),
    (512, torch.float32, "exactly a tile"),
    (513, torch.float32, "a tail of one column"),
    (12292, torch.float32, "three tiles of eight warps and a vector"),
    (12301, torch.float32, "the same, odd: shifted loads, fringe, tail"),
    (9001, torch.bfloat16, "odd, in 16 bits: seven possible shifts"),
    (16384, torch.bfloat16, "no tail at all"),
    (8200, torch.float16, "a tail of one vector"),
    (1037, torch.float64, "two elements per vector"),
]


@KERNELS
@pytest.mark.parametrize(("vocab", "dtype", "reason"), VOCABULARIES, ids=lambda x: str(x).removeprefix("torch."))
def test_vocabularies(vocab: int, dtype: torch.dtype, reason: str, kernel: str) -> None:
    check_one_pass(make_rows(vocab, dtype), kernel, "entropy" if vocab % 2 else "kl")


@KERNELS
@pytest.mark.parametrize("vocab", [136, 133])
@pytest.mark.parametrize("readout", [name for name in READOUTS if name != "plain"])
def test_readouts(readout: str, vocab: int, kernel: str) -> None:
    check_one_pass(make_rows(vocab, shape=(2, 2)), kernel, "entropy", READOUTS[readout])


def gradients_like(target: Tensor) -> RowGradients:
    return RowGradients(*(torch.randn(target.shape, device=DEVICE) for _ in range(3)))


def backward(
    logits: Tensor, target: Tensor, moments: RowMoments, gradients: RowGradients, readout: ReadoutArgs = PLAIN
) -> Tensor:
    """d_logits, in memory that the kernel has to overwrite."""
    d_logits = torch.full_like(logits, 5.0)
    BACKEND.token_stats_backward(logits, target, readout, moments, gradients, d_logits)
    return d_logits


def check_statistics(rows: Rows, readout: ReadoutArgs) -> None:
    """Statistics and the gradient of a weighted sum of them, made from their moments."""
    gradients = gradients_like(rows.target)
    fields = {WEIGHT: torch.ones(rows.target.shape, device=DEVICE), **gradients._asdict()}

    def weighted_sum(t: Any) -> Any:
        return t.d_logp * t.logp + t.d_entropy * t.entropy + t.d_lse * t.lse

    stats, moments = BACKEND.token_stats(rows.logits, rows.target, readout)
    d_logits = backward(rows.logits, rows.target, moments, gradients, readout)
    loss = sum(g * x for g, x in zip(gradients, stats, strict=True))
    check_all((loss, *stats, d_logits), Rows(rows.logits, rows.target, fields), readout, weighted_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [2056, 777])
@pytest.mark.parametrize("readout", ["temperature", "softcap", "row_temperature"])
def test_statistics_and_their_gradients(readout: str, vocab: int, dtype: torch.dtype) -> None:
    check_statistics(make_rows(vocab, dtype, (2, 2)), READOUTS[readout])


@pytest.mark.parametrize(
    ("size", "readout"),
    [
        (1e4, PLAIN),
        (1e8, PLAIN),
        (1e30, PLAIN),
        (2, ReadoutArgs(1.0, None, 0.001, None)),
        (2, ReadoutArgs(1.0, None, 100.0, None)),
        (1e4, ReadoutArgs(-3.0, None, 0.5, None)),
    ],
)
def test_gradients_where_lse_would_lose_their_digits(size: float, readout: ReadoutArgs) -> None:
    """Large logits, low temperatures: two logits near the largest, or all would be certain."""
    rows = make_rows(300)
    rows.logits.copy_(-torch.rand(rows.logits.shape) * size * 0.9).mul_(readout.scale)
    near = torch.tensor([0.0, 1.3, 2.1], device=DEVICE).mul(readout.temperature / readout.scale)
    rows.logits[..., 5:8] = near + torch.tensor(size, device=DEVICE).sqrt().floor()
    rows.target.fill_(6)
    check_statistics(rows, readout)


def test_gradients_with_a_large_offset() -> None:
    rows = make_rows(300)
    check_statistics(Rows(rows.logits + 1000, rows.target, {}), PLAIN)


def test_missing_gradients_are_zero() -> None:
    rows = make_rows(300)
    moments = BACKEND.token_stats(rows.logits, rows.target, PLAIN).moments
    g = torch.randn(1, 2, device=DEVICE)
    zero = torch.zeros_like(g)
    for some, all_three in (((g, None, None), (g, zero, zero)), ((None, None, g), (zero, zero, g))):
        sparse, full = (
            backward(rows.logits, rows.target, moments, RowGradients(*which)) for which in (some, all_three)
        )
        torch.testing.assert_close(sparse, full, rtol=1e-6, atol=1e-9)
        assert sparse.abs().max() > 1e-4


def target_of_shard(target: Tensor, first: int, end: int) -> Tensor:
    here = (target >= first) & (target < end)
    return torch.where(target == IGNORE, IGNORE, torch.where(here, target - first, ELSEWHERE))


@pytest.mark.parametrize("readout", ["plain", "negative_scale", "softcap", "row_temperature"])
@pytest.mark.parametrize("cuts", [(128, 256), (101, 102)], ids=str)
def test_shards(cuts: tuple[int, int], readout: str) -> None:
    """Rows cut into three calls: moments merge to those of the row, and each call writes its part of the gradient."""
    how = READOUTS[readout]
    rows, gradients = make_rows(384, shape=(2, 2)), gradients_like(torch.empty(2, 2))
    rows.logits[0, 0, 256:] = -torch.inf  # a shard without a finite logit, as of a padded vocabulary
    rows.target[0] = torch.tensor([7, 300])
    rows.target[1, 0] = IGNORE
    bounds = list(zip((0, *cuts), (*cuts, 384), strict=True))
    shards = [rows.logits[..., a:b] for a, b in bounds]
    targets = [target_of_shard(rows.target, a, b) for a, b in bounds]
    parts = [BACKEND.token_stats(x, y, how) for x, y in zip(shards, targets, strict=True)]
    for part, y in zip(parts, targets, strict=True):
        elsewhere = y == ELSEWHERE
        assert (part.moments.u_target[elsewhere] == -torch.inf).all()
        assert not (part.stats.logp[elsewhere] > -torch.inf).any()
    kappa = torch.tensor(abs(how.scale), device=DEVICE) if how.softcap is None else torch.tensor(how.softcap)
    kappa = kappa / (how.temperature if how.row_temperature is None else how.row_temperature)
    moments = merge(RowMoments(*map(torch.stack, zip(*(p.moments for p in parts), strict=True))), kappa)
    exact = BACKEND.token_stats(rows.logits.double(), rows.target, how)
    plain = BACKEND.token_stats(rows.logits, rows.target, how)
    read = rows.target != IGNORE
    merged = statistics(moments, kappa.expand(2, 2))
    for name, got, p, t in zip(merged._fields, merged, plain.stats, exact.stats, strict=True):
        check(got[read], p[read], t[read], name, 10.0)
    whole = backward(rows.logits.double(), rows.target, exact.moments, gradients, how)
    one_call = backward(rows.logits, rows.target, plain.moments, gradients, how)
    d_logits = torch.cat([backward(x, y, moments, gradients, how) for x, y in zip(shards, targets, strict=True)], -1)
    check(d_logits, one_call, whole, "d_logits")
    assert not d_logits[1, 0].any()


@KERNELS
def test_a_row_whose_target_is_elsewhere(kernel: str) -> None:
    """No column is the target's: d_logits is -d_logp p_j, and logp is -inf."""
    rows = make_rows(133)
    rows.target.fill_(ELSEWHERE)
    traced = trace([lambda t: t.u * torch.clamp(t.logp, max=0.0).nan_to_num(neginf=0.0) + t.lse])
    fields = {WEIGHT: torch.ones(1, 2, device=DEVICE), "u": torch.ones(1, 2, device=DEVICE)}
    d_logits = torch.full_like(rows.logits, 5.0)
    program = make_program(traced, fields, rows.logits)
    loss, logp, _, lse = BACKEND.fused_loss(rows.logits, rows.target, PLAIN, program, d_logits, kernel)
    assert (logp == -torch.inf).all()
    assert torch.equal(loss, lse)
    p = torch.softmax(rows.logits.double(), -1)
    check(d_logits, torch.softmax(rows.logits, -1), p, "d_logits")


@KERNELS
def test_bounds(kernel: str) -> None:
    readout = ReadoutArgs(-2.0, 30.0, 0.001, None)
    rows = make_rows(40, shape=(1, 6), spread=20)
    rows.target.copy_(rows.logits.argmin(-1))
    _, logp, entropy, _, _ = run(rows, kernel, "kl", readout)
    observed = BACKEND.token_observations(rows.logits, rows.target, readout)
    squares = observed.observations.log_sum_sq_probs
    for bounded in (logp, -entropy, observed.stats.logp, -observed.stats.entropy, squares):
        assert (bounded <= 0).all()


def test_a_target_above_the_largest() -> None:
    """tanh of the target may round above all of the sweep's: 1 - p_y is 0 then, not negative."""
    readout = ReadoutArgs(1.0, 30.0, 0.001, None)
    rows = make_rows(40, spread=0.1)
    rows.logits.scatter_(-1, rows.target.unsqueeze(-1), 60.0)
    moments = BACKEND.token_stats(rows.logits, rows.target, readout).moments
    above = moments._replace(u_target=moments.top * (1 + 2**-23))
    assert (above.u_target > above.top).all()
    d_logits = backward(
        rows.logits, rows.target, above, RowGradients(torch.ones(1, 2, device=DEVICE), None, None), readout
    )
    assert not d_logits.gather(-1, rows.target.unsqueeze(-1)).any()


@KERNELS
@pytest.mark.parametrize("readout", ["plain", "softcap"])
@pytest.mark.parametrize("vocab", [520, 517])
def test_minus_infinity(vocab: int, readout: str, kernel: str) -> None:
    args = READOUTS[readout]
    rows = make_rows(vocab)
    gone = torch.rand(rows.logits.shape, device=DEVICE) < 0.8
    gone.scatter_(-1, rows.target.unsqueeze(-1), False)
    rows.logits.masked_fill_(gone, -torch.inf)
    got = run(rows, kernel, "entropy", args)
    d_logits = got[-1]
    assert torch.equal(d_logits[gone], torch.zeros_like(d_logits[gone]))
    finite = Rows(rows.logits.clamp(min=-1e4), rows.target, rows.fields)
    truth = naive(finite.logits.double(), finite.target, finite.fields, args, with_entropy)
    plain = naive(finite.logits, finite.target, finite.fields, args, with_entropy)
    for name, g, p, t in zip(RESULTS, got, plain, truth, strict=True):
        check(g, p, t, name, 5.0)


@KERNELS
def test_first_tiles_of_minus_infinity(kernel: str) -> None:
    """The running maximum stays -inf for whole tiles, and lanes and slices stay empty."""
    rows = make_rows(12301)
    rows.logits[..., :9000] = -torch.inf
    rows.target.fill_(12000)
    _, logp, entropy, _, d_logits = run(rows, kernel)
    rest = Rows(rows.logits[..., 9000:].contiguous(), rows.target - 9000, rows.fields)
    truth = naive(rest.logits.double(), rest.target, rest.fields, PLAIN, clipped_with_kl)
    torch.testing.assert_close(logp.double(), truth[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), truth[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_logits[..., 9000:].double(), truth[4], rtol=2e-5, atol=1e-9)
    assert not d_logits[..., :9000].any()


@KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_spoil_their_row_only(bad: float, kernel: str) -> None:
    rows = make_rows(600, shape=(1, 3))
    clean = run(rows, kernel)
    rows.logits[0, 1, 17] = bad
    spoilt = run(rows, kernel)
    for a, b in zip(clean, spoilt, strict=True):
        assert b[0, 1].isnan().all()
        assert torch.equal(a[0, ::2], b[0, ::2])


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_certain_target(dtype: torch.dtype, kernel: str) -> None:
    """p_y -> 1: the target's entry keeps its relative accuracy; the sum of the row's gradient is its touchstone."""
    rows = make_rows(64, dtype, spread=1)
    rows.logits.scatter_(-1, rows.target.unsqueeze(-1), 9.0)
    one = torch.ones(1, 2, device=DEVICE)
    fields = {WEIGHT: one, "advantage": one, "ref_logp": rows.fields["ref_logp"]}
    got = run(Rows(rows.logits, rows.target, fields), kernel)[-1]
    truth = naive(rows.logits.double(), rows.target, fields, PLAIN, clipped_with_kl)[4]
    at = rows.target.unsqueeze(-1)
    error = (got.double().gather(-1, at) / truth.gather(-1, at) - 1).abs().max()
    assert error < (2**-8 if dtype == torch.bfloat16 else 2e-5), "1 - p_y is 1e-2, its rounding in fp32 6e-6 of that"


def test_one_minus_p_keeps_its_digits() -> None:
    """d_logits of the target is 1 - p_y, about 1e-9 here, as exactly as s - 1 is known."""
    rows = make_rows(64, spread=0.1)
    at = rows.target.unsqueeze(-1)
    rows.logits.scatter_(-1, at, 25.0)
    truth = -torch.expm1(torch.log_softmax(rows.logits.double(), -1).gather(-1, at))
    assert truth.max() < 1e-8
    moments = BACKEND.token_stats(rows.logits, rows.target, PLAIN).moments
    g = RowGradients(torch.ones(1, 2, device=DEVICE), None, None)
    found = backward(rows.logits, rows.target, moments, g).gather(-1, at)
    exact = moments._replace(s_minus_1=BACKEND.token_stats(rows.logits.double(), rows.target, PLAIN).moments.s_minus_1)
    exact = RowMoments(*(x.float() for x in exact))
    given = backward(rows.logits, rows.target, exact, g).gather(-1, at)
    assert (given / truth - 1).abs().max() < 1e-6
    # The thread that reads the target adds the other columns of a vector to its 1, where they are lost.
    beside = torch.softmax(rows.logits.double(), -1).scatter(-1, at, 0).view(1, 2, 16, 4).sum(-1).gather(-1, at // 4)
    assert (found / (truth - beside) - 1).abs().max() < 1e-6


@KERNELS
def test_ignored_and_impossible_targets(kernel: str) -> None:
    rows = make_rows(77, shape=(2, 3))
    clean = run(rows, kernel)
    rows.target[0, 1], rows.target[1, 0], rows.target[1, 2] = IGNORE, 77, -1
    rows.logits[0, 1] = torch.nan
    d_logits = torch.full_like(rows.logits, 5.0)
    marked = run(rows, kernel, d_logits=d_logits)
    for a, b in zip(clean, marked, strict=True):
        assert torch.equal(b[0, 1], torch.zeros_like(b[0, 1]))
        assert b[1, 0].isnan().all()
        assert b[1, 2].isnan().all()
        assert torch.equal(a[0, 0], b[0, 0])
        assert torch.equal(a[1, 1], b[1, 1])
    observed = BACKEND.token_observations(rows.logits, rows.target, PLAIN)
    *numbers, argmax = observed.observations
    g = RowGradients(torch.ones(2, 3, device=DEVICE), None, None)
    d_logits = backward(rows.logits, rows.target, observed.moments, g)
    assert argmax[0, 1] == argmax[1, 0] == argmax[1, 2] == -1
    for x in (*observed.stats, *observed.moments, *numbers, d_logits):
        assert torch.equal(x[0, 1], torch.zeros_like(x[0, 1]))
        assert x[1, 0].isnan().all()
        assert x[1, 2].isnan().all()


@KERNELS
def test_coefficients_of_zero(kernel: str) -> None:
    rows = make_rows(130)
    silent = Rows(rows.logits, rows.target, rows.fields | {WEIGHT: torch.zeros(1, 2, device=DEVICE)})
    loss, *stats, d_logits = run(silent, kernel, d_logits=torch.full_like(rows.logits, 5.0))
    assert not loss.any()
    assert not d_logits.any()
    for got, expected in zip(stats, run(rows, kernel)[1:4], strict=True):
        assert torch.equal(got, expected)
    silent.logits[0, 0, 3] = torch.nan
    assert not run(silent, kernel, d_logits=torch.full_like(rows.logits, 5.0))[-1].any()


@KERNELS
def test_on_policy(kernel: str) -> None:
    rows = make_rows(130)
    del rows.fields["old_logp"]
    check_one_pass(rows, kernel)


@KERNELS
def test_many_fields(kernel: str) -> None:
    """More than any published loss reads."""
    rows = make_rows(130)
    traced = trace([lambda t, k=k: -t.logp * (k + 1) for k in range(20)])
    assert traced.program.n_fields == 20
    program = make_program(traced, {name: torch.rand(1, 2, device=DEVICE) for name in traced.fields}, rows.logits)
    d_logits = torch.empty_like(rows.logits)
    loss, logp, _, _ = BACKEND.fused_loss(rows.logits, rows.target, PLAIN, program, d_logits, kernel)
    factors = torch.arange(1, 21, device=DEVICE).view(20, 1, 1)
    expected = -logp.double() * (program.fields.double() * factors).sum(0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@KERNELS
def test_no_fields(kernel: str) -> None:
    rows = make_rows(130)
    text = Program(0, 1, (Instruction(Op.MUL, (0, 3)),), (4, 3, ZERO, ZERO)).text  # loss = p0 logp
    params = torch.tensor([-2.0], dtype=torch.float64, device=DEVICE)
    program = ProgramArgs(text, torch.empty(0, 1, 2, device=DEVICE), params)
    d_logits = torch.empty_like(rows.logits)
    loss, logp, _, _ = BACKEND.fused_loss(rows.logits, rows.target, PLAIN, program, d_logits, kernel)
    assert torch.equal(loss, -2 * logp)
    weights = {WEIGHT: torch.full((1, 2), -2.0, device=DEVICE)}
    truth = naive(rows.logits.double(), rows.target, weights, PLAIN, lambda t: t.logp)[-1]
    check(d_logits, naive(rows.logits, rows.target, weights, PLAIN, lambda t: t.logp)[-1], truth, "d_logits")


@KERNELS
def test_no_rows(kernel: str) -> None:
    rows = make_rows(130, shape=(0, 4))
    assert [tuple(x.shape) for x in run(rows, kernel)] == [(0, 4)] * 4 + [(0, 4, 130)]
    assert BACKEND.token_stats(rows.logits, rows.target, PLAIN).stats.logp.shape == (0, 4)
    BACKEND.scale_(rows.logits, torch.tensor(2.0, device=DEVICE))
