"""transformers' loss function for causal language models, and the one beside it that sweeps the logits once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.transformers.models import (
    B,
    L,
    V,
    cancelling,
    loss_and_gradients,
    own_and_exact,
    tiny,
    tokens,
    within_budget,
)
from unirl_kernels.integrations.transformers import FusedHead, causal_lm_loss
from unirl_kernels.testing.budgets import violations

pytest.importorskip("transformers")

from transformers.loss.loss_utils import ForCausalLMLoss

CALLS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "labels": lambda labels: {"labels": labels},
    "int_count": lambda labels: {"labels": labels, "num_items_in_batch": 29},
    "tensor_count": lambda labels: {"labels": labels, "num_items_in_batch": torch.tensor(29)},
    "float_count": lambda labels: {"labels": labels, "num_items_in_batch": torch.tensor(14.5)},
    "ignore_index": lambda labels: {"labels": labels.masked_fill(labels == -100, 5), "ignore_index": 5},
    "shift_labels": lambda labels: {"labels": None, "shift_labels": labels, "num_items_in_batch": torch.tensor(7)},
    "both": lambda labels: {"labels": labels.flip(0), "shift_labels": labels, "an_unknown": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_loss_is_that_of_transformers(call: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(B, L, V)).to(dtype)
    arguments = CALLS[call](tokens()["labels"])

    def of(function: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        loss = function(x, vocab_size=V, **arguments)
        return [loss, *torch.autograd.grad(loss, x)]

    ours, plain = of(causal_lm_loss, logits), of(ForCausalLMLoss, logits)
    assert [x.dtype for x in ours] == [torch.float32, dtype]
    exact = logits.double()
    # Theirs converts its logits to float32: the truth is their formula on logits that are float64 from the start.
    truth = of(lambda x, **kwargs: ForCausalLMLoss(SimpleNamespace(float=lambda: x), **kwargs), exact)
    for x, theirs, wanted in zip(ours, plain, truth, strict=True):
        assert not violations(x.detach(), theirs.detach(), wanted.detach())


def test_loss_refuses_what_does_not_fit() -> None:
    logits, labels = torch.randn(B, L, V), tokens()["labels"]
    with pytest.raises(ValueError, match=rf"logits must have {V + 1} columns \(vocab_size\), got {V}"):
        causal_lm_loss(logits, labels, V + 1)
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        causal_lm_loss(logits, None, V)
    with pytest.raises(ValueError, match="count must be positive, got 0"):
        causal_lm_loss(logits, labels, V, num_items_in_batch=0)
    with pytest.raises(ValueError, match=r"num_items_in_batch must be one number, got shape \(2, 1\)"):
        causal_lm_loss(logits, labels, V, num_items_in_batch=torch.ones(2, 1))
    assert causal_lm_loss(logits, torch.full_like(labels, -100), V) == 0


def test_count_as_a_replica_of_data_parallel_gets_it() -> None:
    """Trainer hands on one count per device, of which each replica gets its part, [1, 1]."""
    logits, labels = torch.randn(B, L, V), tokens()["labels"]
    expected = causal_lm_loss(logits, labels, V, num_items_in_batch=7)
    got = causal_lm_loss(logits, labels, V, num_items_in_batch=torch.tensor([[7]]))
    assert got.shape == ()
    assert torch.equal(got, expected)


def test_loss_function_of_a_model() -> None:
    model, inputs = tiny(), {**tokens(), "num_items_in_batch": 31}
    own, exact = own_and_exact(model, inputs)
    logits = model(**inputs).logits
    model.loss_function = causal_lm_loss
    within_budget(loss_and_gradients(model, inputs), own, exact, cancelling(exact))
    assert torch.equal(model(**inputs).logits, logits)
    with FusedHead(model):
        within_budget(loss_and_gradients(model, inputs, logits=False), own, exact, cancelling(exact))
