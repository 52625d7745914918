"""The Triton kernels: every path of a row, against naive PyTorch in fp64. Interpreted where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backends.triton.rows import (
    BACKEND,
    DEVICE,
    PLAIN,
    READOUTS,
    Rows,
    check,
    check_one_pass,
    clipped_with_kl,
    make_rows,
    naive,
    run,
    with_entropy,
)
from unirl_kernels.backends import RowFields, RowGradients
from unirl_kernels.batch import IGNORE

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [2056, 777])
@pytest.mark.parametrize("readout", ["temperature", "softcap", "row_temperature"])
def test_statistics_and_their_gradients(readout: str, vocab: int, dtype: torch.dtype) -> None:
    rows = make_rows(vocab, dtype, (2, 2))
    gradients = RowGradients(*(torch.randn(2, 2, device=DEVICE) for _ in range(3)))

    def weighted_sum(t: Any) -> Any:
        return gradients.d_logp * t.logp + gradients.d_entropy * t.entropy + gradients.d_lse * t.lse

    ones = RowFields(torch.ones(2, 2, device=DEVICE), None, None, None)
    args = (rows.target, ones, READOUTS[readout], weighted_sum)
    truth = naive(rows.logits.double(), *args)
    plain = naive(rows.logits.to(torch.promote_types(dtype, torch.float32)), *args)
    stats = BACKEND.token_stats(rows.logits, rows.target, READOUTS[readout])
    d_logits = BACKEND.empty(rows.logits.shape, rows.logits.dtype, rows.logits.device)
    BACKEND.token_stats_backward(rows.logits, rows.target, stats, gradients, READOUTS[readout], d_logits)
    condition = max(1.0, truth[3].abs().max().item())
    for name, got, at in zip((*stats._fields, "d_logits"), (*stats, d_logits), (1, 2, 3, 4), strict=True):
        check(got, plain[at], truth[at], name, condition)


def test_missing_gradients_are_zero() -> None:
    rows = make_rows(300)
    stats = BACKEND.token_stats(rows.logits, rows.target, PLAIN)
    g = torch.randn(1, 2, device=DEVICE)
    zero = torch.zeros_like(g)
    for some, all_three in (((g, None, None), (g, zero, zero)), ((None, None, g), (zero, zero, g))):
        sparse, full = (
            BACKEND.empty(rows.logits.shape, rows.logits.dtype, rows.logits.device),
            BACKEND.empty(rows.logits.shape, rows.logits.dtype, rows.logits.device),
        )
        BACKEND.token_stats_backward(rows.logits, rows.target, stats, RowGradients(*some), PLAIN, sparse)
        BACKEND.token_stats_backward(rows.logits, rows.target, stats, RowGradients(*all_three), PLAIN, full)
        torch.testing.assert_close(sparse, full, rtol=1e-6, atol=1e-9)
        assert sparse.abs().max() > 1e-4


def test_backward_far_from_zero() -> None:
    """Logits around 1000: log p = z - lse would lose five digits there, (z - z_y) + logp does not."""
    rows = make_rows(300)
    shifted = rows.logits + 1000
    g = RowGradients(torch.ones(1, 2, device=DEVICE), None, None)
    results = []
    for x in (shifted, shifted.double()):
        stats = BACKEND.token_stats(x, rows.target, PLAIN)
        results.append(BACKEND.empty(x.shape, x.dtype, x.device))
        BACKEND.token_stats_backward(x, rows.target, stats, g, PLAIN, results[-1])
    assert (results[0] - results[1]).norm() < 2e-6 * results[1].norm()


@KERNELS
@pytest.mark.parametrize("readout", ["plain", "softcap"])
@pytest.mark.parametrize("vocab", [520, 517])
def test_minus_infinity(vocab: int, readout: str, kernel: str) -> None:
    args = READOUTS[readout]
    rows = make_rows(vocab)
    gone = torch.rand(rows.logits.shape, device=DEVICE) < 0.8
    gone.scatter_(-1, rows.target.unsqueeze(-1), False)
    rows.logits.masked_fill_(gone, -torch.inf)
    loss, logp, entropy, d_logits = run(rows, kernel, "entropy", args)
    assert torch.equal(d_logits[gone], torch.zeros_like(d_logits[gone]))
    finite = Rows(rows.logits.clamp(min=-1e4), rows.target, rows.fields)
    truth = naive(finite.logits.double(), finite.target, finite.fields, args, with_entropy)
    plain = naive(finite.logits, finite.target, finite.fields, args, with_entropy)
    for name, got, at in (("loss", loss, 0), ("logp", logp, 1), ("entropy", entropy, 2), ("d_logits", d_logits, 4)):
        check(got, plain[at], truth[at], name, 5.0)


@KERNELS
def test_first_tiles_of_minus_infinity(kernel: str) -> None:
    """The running maximum stays -inf for whole tiles, and lanes and slices stay empty."""
    rows = make_rows(12301)
    rows.logits[..., :9000] = -torch.inf
    rows.target.fill_(12000)
    _, logp, entropy, d_logits = run(rows, kernel)
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
    fields = RowFields(torch.ones(1, 2, device=DEVICE), torch.ones(1, 2, device=DEVICE), None, rows.fields.ref_logp)
    got = run(Rows(rows.logits, rows.target, fields), kernel)[3]
    truth = naive(rows.logits.double(), rows.target, fields, PLAIN, clipped_with_kl)[4]
    at = rows.target.unsqueeze(-1)
    error = (got.double().gather(-1, at) / truth.gather(-1, at) - 1).abs().max()
    assert error < (2**-8 if dtype == torch.bfloat16 else 2e-5), "1 - p_y is 1e-2, its rounding in fp32 6e-6 of that"


def test_one_minus_p_keeps_its_digits() -> None:
    """d_logits of the target is 1 - p_y, to relative accuracy, when logp is: here 1 - p_y is about 1e-9."""
    rows = make_rows(64, spread=0.1)
    rows.logits.scatter_(-1, rows.target.unsqueeze(-1), 25.0)
    log_p = torch.log_softmax(rows.logits.double(), -1).gather(-1, rows.target.unsqueeze(-1))
    stats = BACKEND.token_stats(rows.logits, rows.target, PLAIN)._replace(logp=log_p.squeeze(-1).float())
    d_logits = BACKEND.empty(rows.logits.shape, rows.logits.dtype, rows.logits.device)
    g = RowGradients(torch.ones(1, 2, device=DEVICE), None, None)
    BACKEND.token_stats_backward(rows.logits, rows.target, stats, g, PLAIN, d_logits)
    truth = -torch.expm1(log_p)
    assert truth.max() < 1e-8
    assert (d_logits.gather(-1, rows.target.unsqueeze(-1)) / truth - 1).abs().max() < 1e-6


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
    stats = BACKEND.token_stats(rows.logits, rows.target, PLAIN)
    g = RowGradients(torch.ones(2, 3, device=DEVICE), None, None)
    BACKEND.token_stats_backward(rows.logits, rows.target, stats, g, PLAIN, d_logits.fill_(5.0))
    for x in (*stats, d_logits):
        assert torch.equal(x[0, 1], torch.zeros_like(x[0, 1]))
        assert x[1, 0].isnan().all()
        assert x[1, 2].isnan().all()


@KERNELS
def test_coefficients_of_zero(kernel: str) -> None:
    rows = make_rows(130)
    silent = Rows(rows.logits, rows.target, rows.fields._replace(weight=torch.zeros_like(rows.fields.weight)))
    loss, logp, _, d_logits = run(silent, kernel, d_logits=torch.full_like(rows.logits, 5.0))
    assert not loss.any()
    assert not d_logits.any()
    assert torch.equal(logp, run(rows, kernel)[1])


@KERNELS
def test_on_policy(kernel: str) -> None:
    rows = make_rows(130)
    check_one_pass(Rows(rows.logits, rows.target, rows.fields._replace(old_logp=None)), kernel)


@KERNELS
def test_no_rows(kernel: str) -> None:
    rows = make_rows(130, shape=(0, 4))
    assert [tuple(x.shape) for x in run(rows, kernel)] == [(0, 4)] * 3 + [(0, 4, 130)]
    assert BACKEND.token_stats(rows.logits, rows.target, PLAIN).logp.shape == (0, 4)
    BACKEND.scale_(rows.logits, torch.tensor(2.0, device=DEVICE))
