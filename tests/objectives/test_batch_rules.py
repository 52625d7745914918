"""Rules of the whole batch where tokens tie, and where all weights are 0."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from unirl_kernels.objectives import BatchNormalized, Clip, IcePop, Scaled
from unirl_kernels.objectives.batch import largest


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (2e-4, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_exactly_the_share_is_taken_of_tokens_that_tie(share: float, n: int) -> None:
    valid = torch.tensor([False, True, True, True, True, True, True, True, True])
    chosen = largest(torch.zeros(9), valid, share)
    assert chosen.tolist() == [False] + [k < n for k in range(8)]
    lowest = largest(torch.full((9,), -torch.inf), valid, share)
    assert int(lowest.sum()) <= n
    assert not bool(lowest[0])


def test_weights_that_are_all_0_stay_0() -> None:
    logits = torch.zeros(2, 2, 4, requires_grad=True)
    old = torch.full((2, 2), -1.0)
    batch = uk.Batch(
        torch.tensor([[1, 2], [3, 0]]),
        advantage=torch.tensor([1.0, -1.0]),
        old_logp=old,
        fields={"rollout_logp": old - 3},
    )
    out = uk.fused_loss(logits, batch, uk.Loss(Scaled(Clip(), BatchNormalized(IcePop())), uk.TokenMean()))
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad is not None
    assert not bool(logits.grad.any())
