"""ms-swift's scoring on TRL's functions and on this package's: values and gradients within budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("swift", reason="ms-swift is not installed: make test-trainers")

from swift.rlhf_trainers import grpo_trainer, rlhf_mixin

from unirl_kernels.integrations import swift
from unirl_kernels.testing.budgets import condition_of, violations

B, L, V = 3, 7, 53


def scored(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities as the preference trainers sum them, entropies as GRPO logs them, and a gradient of both."""
    mixin: Any = rlhf_mixin.RLHFTrainerMixin
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1))
    leaf = logits.clone().requires_grad_()
    logp, _, _ = mixin.get_per_token_logps(trainer, leaf * 1, labels)
    entropy = grpo_trainer.entropy_from_logits(leaf)
    (gradient,) = torch.autograd.grad((logp.square() + 0.1 * entropy).sum(), leaf)
    return logp.detach(), entropy.detach(), gradient


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    labels = torch.randint(V, (B, L))
    labels[0, :3] = labels[1, 5:] = -100
    return 2 * torch.randn(B, L, V), labels


def problems(given: tuple[Tensor, Tensor], off: float = 1.0) -> list[str]:
    logits, labels = given
    plain, exact = scored(logits, labels), scored(logits.double(), labels)
    with swift.patch():
        got = scored(logits, labels)
    found = []
    for k, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        found += [f"{k}: {x}" for x in violations(off * a, b, c, condition=condition_of(c, 10.0))]
    return found


def test_values_and_gradients_are_its_own(given: tuple[Tensor, Tensor]) -> None:
    assert problems(given) == []


def test_a_slightly_wrong_value_would_show(given: tuple[Tensor, Tensor]) -> None:
    assert len(problems(given, off=1.0001)) >= 3


def test_packed_rows_and_functions_given_back() -> None:
    own = grpo_trainer.selective_log_softmax, rlhf_mixin.selective_log_softmax, grpo_trainer.entropy_from_logits
    logits, labels = torch.randn(B * L, V), torch.randint(V, (B * L,))
    swift.patch()
    got = grpo_trainer.selective_log_softmax(logits, labels)
    swift.patch()
    swift.unpatch()
    now = grpo_trainer.selective_log_softmax, rlhf_mixin.selective_log_softmax, grpo_trainer.entropy_from_logits
    assert now == own
    exact = own[0](logits.double(), labels)
    assert not violations(got, own[0](logits, labels), exact, condition=condition_of(exact, 10.0))
