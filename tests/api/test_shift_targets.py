"""Next-token targets: padded, packed, empty."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk


def test_packed_sequences_do_not_predict_one_another() -> None:
    ids, ends = torch.arange(10, 17), torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 1])
    expected = torch.tensor([11, 12, -100, -100, 15, 16, -100])
    assert torch.equal(uk.shift_targets(ids, cu_seqlens=ends), expected)
    masked = torch.tensor([11, 12, -100, -100, -100, 16, -100])
    assert torch.equal(uk.shift_targets(ids, mask, ends), masked)
    padded = torch.stack([ids[:3], ids[4:]])
    packed = uk.shift_targets(padded.reshape(-1), cu_seqlens=torch.tensor([0, 3, 6]))
    assert torch.equal(packed.view(2, 3), uk.shift_targets(padded))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 1)], ids=str)
def test_nothing_to_predict(shape: tuple[int, int]) -> None:
    target = uk.shift_targets(torch.zeros(shape, dtype=torch.int64))
    assert target.shape == shape
    assert bool((target == uk.IGNORE).all()) or not shape[0]


def test_empty_packed_batch() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert uk.shift_targets(empty, cu_seqlens=torch.tensor([0, 0])).shape == (0,)


def test_shapes_that_do_not_fit() -> None:
    ends = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"input_ids must have shape \[T\] with cu_seqlens, got \(1, 5\)"):
        uk.shift_targets(torch.zeros(1, 5, dtype=torch.int64), cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, L\], or \[T\] with cu_seqlens, got \(5,\)"):
        uk.shift_targets(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target has shape \(1, 5\); give target\.reshape\(-1\)"):
        uk.Batch(torch.zeros(1, 5, dtype=torch.int64), cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"advantage is ambiguous: target has 2 tokens in as many sequences"):
        uk.Batch(torch.tensor([1, 2]), torch.tensor([1.0, -7.0]), cu_seqlens=torch.tensor([0, 2, 2]))
