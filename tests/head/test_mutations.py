"""The parity check of linear heads can fail: it finds wrong matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.linear import RAGGED, Wrapped, budget, changed_matmuls, check, fused, make_head


class WithoutSecondChunk(Wrapped):
    def __init__(self, matmuls: Any) -> None:
        super().__init__(matmuls)
        self.calls = 0

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        self.calls += 1
        if self.calls != 2:
            self.matmuls.add_d_weight(d_logits, hidden, total, first)


class WithoutAccumulation(Wrapped):
    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        self.matmuls.add_d_weight(d_logits, hidden, total, True)


class WithoutBias(Wrapped):
    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        self.matmuls.logits(hidden, None, out)


class RoundedLogits(Wrapped):
    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        self.matmuls.logits(hidden, bias, out)
        out.copy_(out.bfloat16())


class RoundedGradient(Wrapped):
    def d_hidden(self, d_logits: Tensor) -> Tensor:
        return self.matmuls.d_hidden(d_logits.bfloat16().float())


MUTANTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "d_weight of a chunk skipped": (WithoutSecondChunk, "d_weight"),
    "accumulation forgotten": (WithoutAccumulation, "d_weight"),
    "bias dropped": (WithoutBias, "loss"),
    "logits rounded to bf16": (RoundedLogits, "loss"),
    "gradient of the logits rounded to bf16": (RoundedGradient, "d_hidden"),
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", ["grpo", "dpo"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda name: name.replace(" ", "_"))
def test_a_wrong_product_fails(backend: str, mutant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, where = MUTANTS[mutant]
    loss = BY_NAME[name]
    head = make_head(RAGGED, loss)
    plan = uk.Plan(backend, max_chunk_bytes=budget(head, 5, backend))
    check(fused(head, loss.make(), plan), head, loss)
    with changed_matmuls(monkeypatch, backend, change):
        got = fused(head, loss.make(), plan)
    with pytest.raises(AssertionError, match=where):
        check(got, head, loss)


@pytest.mark.parametrize("field", ["loss", "d_hidden", "d_weight", "d_bias", "logp", "entropy"])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0001), (torch.bfloat16, 1.01)], ids=str)
def test_a_result_slightly_off_fails(field: str, dtype: torch.dtype, factor: float) -> None:
    loss = BY_NAME["grpo"]
    head = make_head(RAGGED, loss, dtype)
    got = fused(head, loss.make())
    check(got, head, loss)
    with pytest.raises(AssertionError, match=field):
        check(got._replace(**{field: getattr(got, field) * factor}), head, loss)
