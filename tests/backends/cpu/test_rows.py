"""The native CPU kernels on rows of every kind: anywhere in memory, split over threads, masked, broken, too many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.backends.cpu.rows import DTYPES, IDENTITY, SEGMENT, fields_of, fused, naive, one_thread, row_dtype, rows_of
from unirl_kernels.backends import RowFields, RowGradients, RowStats, cpu
from unirl_kernels.testing.budgets import violations


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_row_s_own(dtype: torch.dtype) -> None:
    """One or two threads, whole rows or split ones, any place in memory, any neighbours, in place or not."""
    vocab = 5 * SEGMENT + 77
    logits, target = rows_of(dtype, 16, vocab)
    target[0, 5] = uk.IGNORE
    fields = fields_of(logits, target)
    torch.set_num_threads(2)
    whole = fused(logits, target, fields)
    stats = cpu.token_observations(logits, target, IDENTITY)
    gradients = RowGradients(*torch.randn(3, 1, 16, dtype=stats.logp.dtype))

    def check(rows: slice, x: Tensor, in_place: bool = False) -> None:
        own = RowFields(*(f[:, rows].contiguous() for f in fields))
        before = cpu.token_observations(x, target[:, rows].contiguous(), IDENTITY)
        d_x = torch.empty_like(logits[:, rows])
        own_gradients = RowGradients(*(g[:, rows].contiguous() for g in gradients))
        cpu.token_stats_backward(x, target[:, rows].contiguous(), RowStats(*before[:3]), own_gradients, IDENTITY, d_x)
        got = fused(x, target[:, rows].contiguous(), own, x if in_place else None)
        for a, b in zip((*whole, *stats, reference), (*got, *before, d_x), strict=True):
            assert torch.equal(a[:, rows], b)

    reference = cpu.empty(logits.shape, logits.dtype, logits.device)
    cpu.token_stats_backward(logits, target, RowStats(*stats[:3]), gradients, IDENTITY, reference)
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
