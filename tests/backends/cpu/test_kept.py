"""Losses without a gradient of the entropy: the first sweep keeps exponentials, the second multiplies them.

``test_rows`` has losses with one, whose second sweep makes them again. Rows of few logits are worked on together. As in
``test_instruction_sets``, this file runs again in fresh processes with the other instruction sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.cpu.rows import DTYPES, IDENTITY, SEGMENT, naive, one_thread, program_of, row_dtype, rows_of
from unirl_kernels.backends import cpu
from unirl_kernels.backends.groups import FusedRows, ReadoutArgs
from unirl_kernels.testing.budgets import violations

STREAMED_BYTES = 32 * 2**20
NEGATIVE = IDENTITY._replace(scale=-0.7, temperature=0.8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    with one_thread():
        yield


def objective(t: Any) -> Any:
    return torch.exp(0.3 * t.logp).clamp(0.1, 0.9) - t.logp + 0.2 * t.lse


def fused(x: Tensor, target: Tensor, readout: ReadoutArgs = IDENTITY, in_place: bool = False) -> tuple[Tensor, ...]:
    """loss, logp, entropy, lse and d_logits."""
    d_x = x if in_place else cpu.empty(x.shape, x.dtype, x.device)
    weight = torch.linspace(0.5, 1.5, target.shape[1], dtype=row_dtype(x.dtype))[None]
    rows = cpu.fused_loss(x, target, readout, program_of(objective, weight), d_x, "rows")
    assert isinstance(rows, FusedRows)
    return *rows, d_x


def assert_right(x: Tensor, target: Tensor, readout: ReadoutArgs, got: tuple[Tensor, ...]) -> None:
    """The gradient against autograd's in fp64, within twice the error of the row's own dtype."""
    weight = torch.linspace(0.5, 1.5, target.shape[1], dtype=torch.float64)[None]
    logp = got[1].double()
    power = (0.3 * logp).exp()
    d_logp = weight * (torch.where((power > 0.1) & (power < 0.9), 0.3 * power, 0) - 1)
    weights = torch.stack([d_logp, torch.zeros_like(logp), 0.2 * weight])
    stats, truth = naive(x.double(), target, readout, weights)
    plain_stats, plain = naive(x.to(row_dtype(x.dtype)), target, readout, weights)
    assert not violations(got[1], plain_stats[0], stats[0])
    assert not violations(got[4], plain.to(x.dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("readout", [IDENTITY, NEGATIVE], ids=["identity", "negative"])
@pytest.mark.parametrize("vocab", [2, 7, 64, 300, SEGMENT, 3 * SEGMENT + 77])
def test_gradients(vocab: int, readout: ReadoutArgs, dtype: torch.dtype) -> None:
    x, target = rows_of(dtype, 37, vocab)
    got = fused(x, target, readout)
    assert_right(x, target, readout, got)
    for rows in (slice(0, 1), slice(5, 23), slice(36, 37)):  # other neighbours: of groups of up to 16
        weight = torch.linspace(0.5, 1.5, 37, dtype=row_dtype(dtype))[None, rows].contiguous()
        d_x = torch.empty_like(x[:, rows])
        alone = cpu.fused_loss(
            x[:, rows], target[:, rows].contiguous(), readout, program_of(objective, weight), d_x, "rows"
        )
        for a, b in zip(got, (*alone, d_x), strict=True):
            assert torch.equal(a[:, rows], b)
    for a, b in zip(got, fused(x.clone(), target, readout, in_place=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("readout", [IDENTITY, NEGATIVE], ids=["identity", "negative"])
def test_masked_segments_and_broken_rows(readout: ReadoutArgs, dtype: torch.dtype) -> None:
    """Where -inf is probability 0, in whole segments too, the gradient is exactly 0; NaN and inf make their row NaN."""
    vocab = 3 * SEGMENT + 5
    x, _ = rows_of(dtype, 4, vocab)
    target = torch.tensor([[2 * SEGMENT + 3, vocab - 1, 0, 1]])
    never = -torch.inf if readout.scale > 0 else torch.inf
    masked = torch.zeros(4, vocab, dtype=torch.bool)
    masked[0, : 2 * SEGMENT], masked[1, SEGMENT : 3 * SEGMENT], masked[1, :7] = True, True, True
    x[0] = x[0].masked_fill(masked, never)
    x[0, 2, SEGMENT + 1], x[0, 3, vocab - 2] = torch.nan, -never
    got = fused(x, target, readout)
    assert not got[4][0][masked].any()
    assert bool(got[4][0, 2:].isnan().all())
    assert bool(got[1][0, 2:].isnan().all())
    # Without them the gradient is the same but for the order of sums.
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 2e-6)
    for row in range(2):
        kept = ~masked[row]
        weight = torch.tensor([[0.5 + row / 3]], dtype=row_dtype(dtype))
        short, index = x[:, row : row + 1, kept], kept.nonzero().squeeze(-1)
        column, d_short = (index == target[0, row]).nonzero(), torch.empty_like(short)
        cpu.fused_loss(short, column, readout, program_of(objective, weight), d_short, "rows")
        torch.testing.assert_close(got[4][0, row, kept], d_short[0, 0], rtol=rounding, atol=0)
    for a, b in zip(got, fused(x.clone(), target, readout, in_place=True), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rest", [0, 33])
def test_gradients_that_are_written_past_the_caches(rest: int, dtype: torch.dtype) -> None:
    """Aligned rows and others: the bits of gradients that are not, on any number of threads."""
    vocab = 4 * SEGMENT + rest
    tokens = STREAMED_BYTES // (2 * vocab) + 1
    x = torch.randn(1, 16, vocab).mul_(3).to(dtype).repeat(1, tokens // 16 + 1, 1)
    target = torch.randint(0, vocab, (1, x.shape[1]))
    target[0, 3] = -100
    assert x.numel() * 2 >= STREAMED_BYTES
    streamed = fused(x, target)
    torch.set_num_threads(2)
    for a, b in zip(streamed, fused(x, target), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(streamed, fused(x, target, in_place=True), strict=True):
        assert torch.equal(a, b)
