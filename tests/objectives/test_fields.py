"""Fields of any dtype mean the same inside a kernel and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk

HALF = torch.tensor([1.0078125, 0.50390625, -0.25390625, 3.0])
BYTES = torch.tensor([3, 250, 7, 128], dtype=torch.uint8)

OBJECTIVES: dict[str, tuple[Callable[[Any], Tensor], Tensor, Tensor]] = {
    "bf16 rounds a product": (lambda t: t.x * 1.1 * t.logp, HALF.bfloat16(), HALF.double() * 1.1),
    "fp16 rounds a product": (lambda t: t.x * t.x * t.logp, HALF.half(), HALF.double() ** 2),
    "bf16 compares rounded": (lambda t: (t.x > 3.001) * t.logp, HALF.bfloat16(), torch.zeros(4).double()),
    "uint8 wraps around": (lambda t: (t.x - 5) * t.logp, BYTES, BYTES.double() - 5),
    "uint8 overflows": (lambda t: t.x * t.x * t.logp, BYTES, BYTES.double() ** 2),
    "int8 overflows": (lambda t: (t.x + t.x) * t.logp, BYTES.view(torch.int8), 2 * BYTES.view(torch.int8).double()),
}


@pytest.mark.parametrize("kernel", ["rows", "composed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_narrow_dtypes_neither_round_nor_wrap(name: str, kernel: str) -> None:
    objective, field, factor = OBJECTIVES[name]
    logits, target = torch.randn(4, 1, 9, requires_grad=True), torch.randint(0, 9, (4, 1))
    batch = uk.Batch(target, fields={"x": field.view(4, 1)})
    loss = uk.Loss(objective, uk.TokenMean(1))
    value = uk.fused_loss(logits, batch, loss, plan=uk.Plan("cpu", kernel)).loss
    logp = torch.log_softmax(logits.double(), -1).gather(-1, target.unsqueeze(-1)).flatten()
    terms = factor * logp
    rounding = 8 * torch.finfo(torch.float32).eps * terms.abs().sum().item()
    assert abs(value.item() - terms.sum().item()) <= rounding


def test_a_field_of_sequences_where_each_is_one_token() -> None:
    """[S] and [T] are the same shape there."""
    logits, target = torch.randn(3, 9, requires_grad=True), torch.randint(0, 9, (3,))
    batch = uk.Batch(target, cu_seqlens=torch.arange(4), fields={"group": torch.tensor([5, 2, 5])})
    value = uk.fused_loss(logits, batch, uk.Loss(lambda t: -t.logp, uk.GroupMean())).loss
    logp = torch.log_softmax(logits, -1).gather(-1, target.unsqueeze(-1)).flatten()
    torch.testing.assert_close(value, -((logp[0] + logp[2]) / 2 + logp[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32])
@pytest.mark.parametrize("rows", [torch.float32, torch.float64], ids=str)
def test_every_integer_dtype_in_a_kernel(rows: torch.dtype, dtype: torch.dtype) -> None:
    """2^53, which fp64 rows hold, is 0 as int32."""
    logits, target = torch.randn(4, 1, 9, dtype=rows, requires_grad=True), torch.randint(0, 9, (4, 1))
    batch = uk.Batch(target, fields={"x": torch.tensor([0, 1, 2, 100]).view(4, 1).to(dtype)})
    value = uk.fused_loss(
        logits, batch, uk.Loss(lambda t: t.x * 1.0, uk.TokenMean(1)), plan=uk.Plan("cpu", "rows")
    ).loss
    assert value.item() == 103


def test_an_integer_that_would_be_rounded_is_refused() -> None:
    logits, target = torch.randn(4, 1, 9, requires_grad=True), torch.randint(0, 9, (4, 1))
    batch = uk.Batch(target, fields={"x": torch.tensor([0, 1, 2, 2**24 + 1], dtype=torch.uint32).view(4, 1)})
    with pytest.raises(ValueError, match=r"fields\['x'\] must hold integers of at most 16777216 .* got 16777217"):
        uk.fused_loss(logits, batch, uk.Loss(lambda t: t.x * 1.0), plan=uk.Plan("cpu", "rows"))


def test_weights_of_as_many_pairs_as_tokens() -> None:
    """[S / 2] and [T] are the same shape where half of the sequences are empty."""
    batch = uk.Batch(
        torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1, 1]),
        fields={"share": torch.tensor([4.0, 2.0])},
    )
    twice = uk.Weighted(uk.Weighted(uk.PairMean(), "share"), "share")
    assert uk.Weighted(uk.PairMean(), "share").weights(batch).tolist() == [8]
    assert twice.weights(batch).tolist() == [64]


COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    "less": lambda x, c: torch.where(x < c, 2.0, 1.0),
    "at most": lambda x, c: torch.where(x <= c, 2.0, 1.0),
    "more": lambda x, c: torch.where(x > c, 2.0, 1.0),
    "at least": lambda x, c: torch.where(x >= c, 2.0, 1.0),
    "equal": lambda x, c: torch.where(x == c, 2.0, 1.0),
    "not equal": lambda x, c: torch.where(x != c, 2.0, 1.0),
    "sign": lambda x, c: torch.sign(x - c),
    "difference": lambda x, c: (x - c) * 1e9,
    "a number on the left": lambda x, c: torch.where(c < x, 2.0, 1.0),
    "its negative": lambda x, c: torch.where(-x == -c, 2.0, 1.0),
    "clamp": lambda x, c: (x.clamp(max=c) - x) * 1e9,
}


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", COMPARISONS)
def test_a_field_equals_the_number_that_was_stored_in_it(name: str, dtype: torch.dtype, backend: str) -> None:
    """fp32 rounds 0.1 up and 0.7 down: kernels that keep numbers in fp64 would find a field unequal to its number."""
    objective, numbers = COMPARISONS[name], (0.1, 0.7, 0.3, 1 / 3, 0.5)
    logits, target = torch.randn(1, 9, dtype=dtype, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    logp = torch.log_softmax(logits.detach().double(), -1)[0, 0].item()
    for c in numbers:
        x = torch.tensor([c], dtype=dtype)
        batch = uk.Batch(target, cu_seqlens=torch.tensor([0, 1]), fields={"x": x})
        loss = uk.Loss(lambda t, c=c: objective(t.x, c) * t.logp, uk.TokenMean(1))
        expected = objective(x, c).item() * logp
        for wanted in (True, False):
            value = uk.fused_loss(logits.detach().requires_grad_(wanted), batch, loss, plan=uk.Plan(backend)).loss
            assert value.item() == pytest.approx(expected, rel=1e-5), (c, wanted)
