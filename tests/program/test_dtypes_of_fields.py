"""Fields of any dtype: one pass computes what PyTorch computes, or raises an error that names the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk

TARGET = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
MASK = torch.tensor([[True, False, True, False], [False, True, True, False]])
FIELDS = {
    "a": MASK,
    "b": MASK.flip(0),
    "i": torch.tensor([[0, 1, 2, 3], [3, 2, -1, 0]]),
    "j": torch.tensor([[1, 1, 2, 0], [3, 2, 1, 4]]),
    "x": torch.full((2, 4), 1.7),
}

Objective = Callable[[Any], Any]

REFUSED: dict[str, tuple[str, Objective]] = {
    "a + b": ("a", lambda t: t.a + t.b),
    "a + condition": ("a", lambda t: t.a + (t.x > 0)),
    "a + True": ("a", lambda t: t.a + True),
    "(a * b) + a": ("a", lambda t: t.a * t.b + t.a),
    "where + a": ("a", lambda t: torch.where(t.x > 0, t.a, t.b) + t.a),
    "nan_to_num + a": ("a", lambda t: torch.nan_to_num(t.a) + t.b),
    "to(device) + a": ("a", lambda t: t.a.to("cpu") + t.b),
    "a - b": ("a", lambda t: t.a - t.b),
    "1 - a": ("a", lambda t: 1 - t.a),
    "-a": ("a", lambda t: -t.a),
    "abs": ("a", lambda t: torch.abs(t.a)),
    "~i": ("i", lambda t: ~t.i),
    "i | a": ("i", lambda t: t.i | t.a),
    "i & i": ("i", lambda t: t.i & t.i),
    "~x": ("x", lambda t: ~t.x),
    "where(i)": ("i", lambda t: torch.where(t.i, t.x, 0)),
    "masked_fill by i": ("i", lambda t: t.x.masked_fill(t.i, 0)),
    "masked_fill of i": ("i", lambda t: t.i.masked_fill(t.a, 0.5)),
    "masked_fill of a": ("a", lambda t: t.a.masked_fill(t.b, 2)),
    "i ** -2": ("i", lambda t: t.i**-2),
    "to(i)": ("i", lambda t: t.x.to(t.i)),
    "to(i + 1)": ("i", lambda t: t.x.to(t.i + 1)),
    "type_as(a)": ("a", lambda t: t.x.type_as(t.a)),
    "a.dtype": ("a", lambda t: t.x.to(t.a.dtype)),
    "i.dtype": ("i", lambda t: t.x.to(t.i.dtype)),
    "full_like(i)": ("i", lambda t: torch.full_like(t.i, 1.7)),
    "full_like(a)": ("a", lambda t: torch.full_like(t.a, 2)),
}

UNSUPPORTED: dict[str, Objective] = {
    "dtype of a condition": lambda t: t.x.type_as(t.x > 0),
    "dtype of a constant": lambda t: t.x.to(torch.tensor(1)),
    "full_like(dtype=int64)": lambda t: torch.full_like(t.logp, 1.7, dtype=torch.int64),
    "ones_like(dtype=bool)": lambda t: torch.ones_like(t.logp, dtype=torch.bool) + t.a,
    "zeros_like(dtype=bool)": lambda t: torch.zeros_like(t.logp, dtype=torch.bool) + t.a,
    "full_like of a condition": lambda t: torch.full_like(t.x > 0, 1.7),
}

LEGAL: dict[str, Objective] = {
    "where": lambda t: torch.where(t.a, t.x, 0),
    "logic": lambda t: torch.where((t.a & ~t.b) | (t.x > 2), t.x, t.j),
    "bool * float": lambda t: t.a * 0.5,
    "a + 1": lambda t: t.a + 1,
    "a + x": lambda t: t.a + t.x,
    "a + i": lambda t: t.a + t.i,
    "a * b": lambda t: t.a * t.b * t.x,
    "1 - a.float()": lambda t: 1 - t.a.float(),
    "i": lambda t: t.i * 0.5 + t.j / 2 - t.x * (t.i - t.j),
    "-i": lambda t: -t.i + abs(t.j),
    "compared": lambda t: (t.i >= t.j) * t.x + (t.a == t.b) * 2.0,
    "logical": lambda t: torch.logical_and(t.i, t.a) * t.x,
    "i ** 2": lambda t: t.i**2,
    "x ** -2": lambda t: t.x**-2,
    "to(x)": lambda t: t.a.to(t.x) + t.b.to(t.logp),
    "x.dtype": lambda t: t.a.to(t.x.dtype) + t.b.to(t.logp.dtype),
    "dtype of a product": lambda t: t.a.to((t.logp * t.i).dtype) + t.b.type_as(t.i / 2),
    "dtype of a.float()": lambda t: t.b.to(t.a.float().dtype) + t.b.to(t.a.double()),
    "full_like": lambda t: torch.full_like(t.i, 2) + torch.full_like(t.x, 1.7) + torch.full_like(t.a, 1) * t.x,
    "likes": lambda t: torch.ones_like(t.i) + torch.zeros_like(t.a, dtype=torch.float32) - t.x,
    "ones_like of bool": lambda t: torch.ones_like(t.a, dtype=torch.float32) + t.b,
    "masked_fill": lambda t: t.i.masked_fill(t.a, 7) + t.x.masked_fill(t.b, 0.5) + t.a.masked_fill(t.b, False) * 1,
}


def one_pass(objective: Objective, plan: uk.Plan | None = None) -> tuple[Tensor, Tensor]:
    logits = torch.linspace(-1, 1, 40).view(2, 4, 5).requires_grad_()
    loss = uk.Loss(lambda t: -t.logp * objective(t), uk.TokenMean())
    out = uk.fused_loss(logits, uk.Batch(TARGET, fields=FIELDS), loss, plan=plan or uk.Plan(kernel="rows"))
    out.loss.backward()
    assert logits.grad is not None
    return out.loss.detach(), logits.grad


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_would_change_the_value_is_refused(name: str) -> None:
    field, objective = REFUSED[name]
    with pytest.raises(
        TypeError, match=rf"fields\['{field}'\].* must be .*, since the objective .*, got (bool|int64|float32)"
    ):
        one_pass(objective)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_dtype_that_is_known_to_change_the_value_is_refused(name: str) -> None:
    with pytest.raises(uk.UnsupportedOperation):
        uk.Loss(UNSUPPORTED[name]).traced()


@pytest.mark.parametrize("name", LEGAL)
def test_fields_of_any_dtype_give_what_pytorch_gives(name: str) -> None:
    torch.testing.assert_close(one_pass(LEGAL[name]), one_pass(LEGAL[name], uk.Plan(kernel="composed")))
