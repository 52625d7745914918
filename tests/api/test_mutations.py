"""The parity check can fail: it finds wrong objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, SHAPES, LossCase, make_case
from tests.parity import check, fused
from unirl_kernels.objectives import KL, Clip, PolicyGradient, Tokens


@dataclass(frozen=True)
class FlippedAdvantage:
    def __call__(self, t: Tokens) -> Tensor:
        ratio = torch.exp(t.logp - t.old_logp)
        return -torch.minimum(-ratio * t.advantage, ratio.clamp(0.8, 1.2) * -t.advantage) + KL(0.04)(t)


def without_policy_term(t: Tokens) -> Tensor:
    return KL(0.04)(t)


def without_clip(t: Tokens) -> Tensor:
    return -torch.exp(t.logp - t.old_logp) * t.advantage + KL(0.04)(t)


@dataclass(frozen=True)
class WithoutLength:
    """Sum over tokens, mean over sequences: 1/|o| dropped."""

    def weights(self, batch: uk.Batch) -> Tensor:
        return batch.valid.double() / batch.n_sequences


@dataclass(frozen=True)
class WithoutEmptySequences:
    """Mean over only the sequences that have tokens."""

    def weights(self, batch: uk.Batch) -> Tensor:
        return uk.SequenceMean().weights(batch) * batch.n_sequences / (batch.lengths > 0).sum()


MUTANTS: dict[str, Callable[[], uk.Loss]] = {
    "advantage's sign flipped": lambda: uk.Loss(FlippedAdvantage()),
    "KL dropped": lambda: uk.grpo(beta=None),
    "KL coefficient 10 % off": lambda: uk.grpo(beta=0.044),
    "policy term dropped": lambda: uk.Loss(without_policy_term),
    "clip dropped": lambda: uk.Loss(without_clip),
    "clip bounds swapped": lambda: uk.Loss(PolicyGradient(Clip(0.2, 0.21), KL(0.04))),
    "1/|o| dropped": lambda: uk.Loss(uk.grpo().objective, WithoutLength()),
    "empty sequences left out": lambda: uk.Loss(uk.grpo().objective, WithoutEmptySequences()),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda name: name.replace(" ", "_"))
def test_a_wrong_loss_fails(mutant: str) -> None:
    caught = 0
    for seed in range(4):
        logits, batch = make_case(SHAPES[0], BY_NAME["grpo"], seed=seed)
        got = fused(logits, batch, MUTANTS[mutant](), uk.Plan())
        try:
            check(got, logits, batch, BY_NAME["grpo"])
        except AssertionError:
            caught += 1
    assert caught, f"four batches did not notice: {mutant}"


@pytest.mark.parametrize(("shape", "factor"), [("small", 1.001), ("small", 0.999), ("bf16", 1.01), ("fp16", 0.99)])
def test_a_gradient_slightly_off_fails(shape: str, factor: float) -> None:
    loss: LossCase = BY_NAME["grpo"]
    logits, batch = make_case(next(s for s in SHAPES if s.name == shape), loss)
    got = fused(logits, batch, loss.make(), uk.Plan())
    check(got, logits, batch, loss)
    with pytest.raises(AssertionError, match="gradient"):
        check(type(got)(got.loss, got.d_logits * factor), logits, batch, loss)
