"""The output layer with prime-rl's signature: log-probabilities, entropies and gradients of the oracle's."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from unirl_kernels.integrations.prime_rl import FusedOutputLinear
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

B, L, D, V = 1, 12, 8, 31


def run(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].T / temperature.unsqueeze(-1)
    logp, entropy = oracle.log_probs(logits, labels), oracle.entropy(logits)
    return [x.detach() for x in (logp, entropy, *torch.autograd.grad((logp.square() + entropy).sum(), leaves))]


def test_values_and_gradients() -> None:
    hidden, labels, temperature = torch.randn(B, L, D), torch.randint(V, (B, L)), torch.rand(B, L) + 0.5
    head = FusedOutputLinear(D, V, 8192)
    hidden.requires_grad_()
    out = head(hidden, labels=labels, temperature=temperature)
    gradients = torch.autograd.grad((out["logprobs"].square() + out["entropy"]).sum(), (hidden, head.weight))
    given = hidden.detach(), head.weight.detach()
    plain = run(*given, labels, temperature)
    exact = run(*(x.double() for x in given), labels, temperature.double())
    for got, own, true in zip((out["logprobs"], out["entropy"], *gradients), plain, exact, strict=True):
        assert not violations(got.detach(), own, true, condition=condition_of(true, 10.0))


def test_signature_is_that_of_prime_rl() -> None:
    assert list(inspect.signature(FusedOutputLinear).parameters) == ["in_features", "out_features", "chunk_size"]
    assert list(inspect.signature(FusedOutputLinear.forward).parameters)[1:] == [
        "hidden_states",
        "labels",
        "temperature",
    ]


@pytest.mark.parametrize("missing", ["labels", "temperature"])
def test_what_is_missing_is_named(missing: str) -> None:
    given = {"labels": torch.zeros(B, L, dtype=torch.int64), "temperature": torch.ones(B, L)} | {missing: None}
    with pytest.raises(ValueError, match=f"{missing} must be given"):
        FusedOutputLinear(D, V, 8)(torch.randn(B, L, D), **given)
