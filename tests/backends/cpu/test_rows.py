"""The native CPU kernels on rows of every kind: anywhere in memory, split over threads, masked, broken, too many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.backends.cpu.rows import (
    DTYPES,
    GRPO,
    IDENTITY,
    SEGMENT,
    fields_of,
    fused,
    naive,
    one_thread,
    row_dtype,
    rows_of,
    rows_of_moments,
)
from unirl_kernels.backends import cpu
from unirl_kernels.backends.groups import ELSEWHERE, RowGradients
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import weight_name
from unirl_kernels.testing.budgets import violations


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_row_s_own(dtype: torch.dtype) -> None:
    """One or two threads, whole rows or split ones, anywhere in memory, any neighbours, in place or not."""
    vocab = 5 * SEGMENT + 77
    logits, target = rows_of(dtype, 16, vocab)
    target[0, 5] = IGNORE
    fields = fields_of(logits, target)
    torch.set_num_threads(2)
    whole = fused(logits, target, fields)
    observed = cpu.token_observations(logits, target, IDENTITY)
    gradients = RowGradients(*torch.randn(3, 1, 16, dtype=row_dtype(dtype)))

    def check(rows: slice, x: Tensor, in_place: bool = False) -> None:
        y = target[:, rows].contiguous()
        before = cpu.token_observations(x, y, IDENTITY)
        d_x = torch.empty_like(logits[:, rows])
        own_gradients = RowGradients(*(g[:, rows].contiguous() for g in gradients))
        cpu.token_stats_backward(x, y, IDENTITY, rows_of_moments(observed.moments, rows), own_gradients, d_x)
        got = fused(x, y, fields[:, :, rows].contiguous(), x if in_place else None)
        groups = zip(observed, before, strict=True)
        for a, b in [*zip(whole, got, strict=True), *(pair for group in groups for pair in zip(*group, strict=True))]:
            assert torch.equal(a[:, rows], b)
        assert torch.equal(reference[:, rows], d_x)

    reference = cpu.empty(logits.shape, logits.dtype, logits.device)
    cpu.token_stats_backward(logits, target, IDENTITY, observed.moments, gradients, reference)
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
    stats, moments = cpu.token_stats(logits, target, readout)
    d_logits = cpu.empty(logits.shape, logits.dtype, logits.device)
    cpu.token_stats_backward(logits, target, readout, moments, RowGradients(*weights), d_logits)
    assert not d_logits[0][~kept].any()
    for row in range(4):
        short, index = logits[:, row : row + 1, kept[row]], kept[row].nonzero().squeeze(-1)
        column = (index == target[0, row]).nonzero()
        own = weights[:, :, row, None]
        truth, d_truth = naive(short.double(), column, readout, own)
        plain, d_plain = naive(short.to(row_dtype(dtype)), column, readout, own)
        for x, p, t in zip(stats, plain, truth, strict=True):
            assert not violations(x[:, row : row + 1], p, t, condition=10)
        assert not violations(d_logits[:, row : row + 1, index], d_plain.to(dtype), d_truth, condition=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_distribution(dtype: torch.dtype) -> None:
    """NaN, +inf or nothing but -inf in a row, or a target that is no column: NaN in all of that row, and only there."""
    vocab = SEGMENT + 100
    logits, target = rows_of(dtype, 8, vocab)
    logits[0, 1, 17] = torch.nan
    logits[0, 2, vocab - 1] = torch.inf
    logits[0, 3] = -torch.inf
    target[0, 4], target[0, 5], target[0, 6] = vocab, -1, IGNORE
    logits[0, 6] = torch.nan
    fields = fields_of(torch.randn(1, 8, vocab), target.clamp(0, vocab - 1)).to(row_dtype(dtype))
    stats, moments = cpu.token_stats(logits, target, IDENTITY)
    *rows, d_logits = fused(logits, target, fields)
    broken = torch.tensor([False, True, True, True, True, True, False, False])
    loss, logp, entropy, lse = rows
    for x in (stats.logp, stats.entropy, loss, logp, entropy):
        assert torch.equal(x[0].isnan(), broken)
    without_a_logit = torch.arange(8) == 3
    for x in (stats.lse, lse):
        assert torch.equal(x[0].isnan(), broken & ~without_a_logit)
        assert x[0, 3] == -torch.inf
    for x in (moments.top, moments.s_minus_1, moments.sz):
        assert torch.equal(x[0].isnan(), broken & ~without_a_logit)
    assert (moments.top[0, 3], moments.s_minus_1[0, 3], moments.sz[0, 3]) == (-torch.inf, -1, 0)
    assert torch.equal(d_logits[0].isnan(), broken.unsqueeze(-1).expand(8, vocab))
    assert not any(x[0, 6].any() for x in (*stats, *moments, *rows, d_logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_gradient_are_exactly_zero(dtype: torch.dtype) -> None:
    """Whatever the logits are, but not if the target is outside the vocabulary."""
    logits, target = rows_of(dtype, 4, 300)
    logits[0, 1, 17] = torch.nan
    target[0, 3] = 300
    fields = fields_of(torch.randn(1, 4, 300), target.clamp(0, 299)).to(row_dtype(dtype))
    fields[GRPO.fields.index(weight_name(0))] = 0
    loss, *_, d_logits = fused(logits, target, fields)
    moments = cpu.token_stats(logits, target, IDENTITY).moments
    d_of_stats = torch.empty_like(logits)
    cpu.token_stats_backward(logits, target, IDENTITY, moments, RowGradients(None, None, None), d_of_stats)
    assert not loss[0, :3].any()
    assert loss[0, 3].isnan()
    for d in (d_logits, d_of_stats):
        assert not d[0, :3].any()
        assert not d[0, :3].signbit().any()
        assert d[0, 3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_a_target_that_is_elsewhere(scale: float, dtype: torch.dtype) -> None:
    """Sums and gradients are the same as with a target in this shard, except in the target's column."""
    logits, target = rows_of(dtype, 3, SEGMENT + 5)
    readout = IDENTITY._replace(scale=scale)
    elsewhere = torch.full_like(target, ELSEWHERE)
    here, there = (cpu.token_observations(logits, y, readout) for y in (target, elsewhere))
    assert (there.moments.u_target == -torch.inf).all()
    assert (there.stats.logp == -torch.inf).all()
    pairs = [*zip(here.moments[:3], there.moments[:3], strict=True)]
    pairs += zip(here.stats[1:], there.stats[1:], strict=True)
    pairs += zip(here.observations, there.observations, strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
    gradients = RowGradients(*torch.randn(3, 1, 3, dtype=row_dtype(dtype)))
    results = []
    for y in (target, elsewhere):
        d_logits = torch.empty_like(logits)
        cpu.token_stats_backward(logits, y, readout, here.moments, gradients, d_logits)
        results.append(d_logits)
    same = results[0] == results[1]
    others = torch.ones_like(same).scatter(-1, target.unsqueeze(-1), False)
    assert torch.equal(same | ~others, torch.ones_like(same))
    assert not same.gather(-1, target.unsqueeze(-1)).any()


def test_temperatures_that_are_not_positive_give_nan() -> None:
    logits, target = rows_of(torch.float32, 3, 100)
    readout = IDENTITY._replace(row_temperature=torch.tensor([[1.0, 0.0, -1.0]]))
    stats = cpu.token_stats(logits, target, readout).stats
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
    target = torch.full((1, tokens), IGNORE)
    used = torch.tensor([0, 7000, tokens - 1])
    columns = torch.tensor([[1, 77, vocab - 1]])
    target[:, used] = columns
    logits[0, used] = torch.randn(3, vocab).bfloat16()
    before = resident_bytes()
    stats = cpu.token_stats(logits, target, IDENTITY).stats
    assert resident_bytes() - before < 64 * 2**20
    few = logits[:, used].contiguous()
    alone = cpu.token_stats(few, columns, IDENTITY).stats
    for x, y in zip(stats, alone, strict=True):
        assert torch.equal(x[:, used], y)
        assert x.count_nonzero() == 3
    far = memory.as_strided((1, 3, vocab), (0, (tokens - 1) // 2 * vocab, 1))
    far.copy_(few)
    fields = fields_of(few, columns)
    for x, y in zip(fused(few, columns, fields), fused(far, columns, fields, far), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], ids=hex)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_nan_whatever_its_bits(dtype: torch.dtype, bits: int) -> None:
    """0x7fffffff is what a GPU computes; adding to it in order to round would make it -0."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    logits, target = rows_of(dtype, 4, 100)
    fields = fields_of(logits, target)
    for at in range(len(fields)):
        given = fields.float()
        given[at, 0, 2] = nan
        d_logits = fused(logits, target, given.to(fields.dtype))[-1]
        assert d_logits.isnan().any(-1).flatten().tolist() == [False, False, True, False], at
    moments = cpu.token_stats(logits, target, IDENTITY).moments
    for at in range(3):
        upstream = torch.zeros(3, 1, 4)
        upstream[at, 0, 2] = nan
        d_logits = torch.empty_like(logits)
        gradients = RowGradients(*upstream.to(row_dtype(dtype)))
        cpu.token_stats_backward(logits, target, IDENTITY, moments, gradients, d_logits)
        assert d_logits.isnan().all(-1).flatten().tolist() == [False, False, True, False], at
