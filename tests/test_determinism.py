"""The same bits on a re-run, and for a row in whatever batch it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.places import Place

LOSS = uk.Loss(uk.grpo().objective, uk.TokenMean(16))


def gradient_and_logp(place: Place, logits: Tensor, target: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    batch = uk.Batch(target, *fields.unbind(-1))
    out = uk.fused_loss(leaf, batch, LOSS, plan=place.plan())
    return torch.autograd.grad(out.loss, leaf)[0], out.logp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [33, 5003])
def test_bits_depend_on_the_row_alone(vocab: int, dtype: torch.dtype, place: Place) -> None:
    if place.backend == "eager":
        pytest.skip("torch chooses how to add by the shape of the whole tensor")
    logits = (torch.randn(6, 4, vocab) * 3).to(dtype).to(place.device)
    target = torch.randint(0, vocab, (6, 4)).to(place.device)
    fields = (-3 * torch.rand(6, 4, 3)).to(place.device)
    whole = gradient_and_logp(place, logits, target, fields)
    again = gradient_and_logp(place, logits, target, fields)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    for rows in (slice(2, 3), slice(1, 5), slice(5, 6)):
        alone = gradient_and_logp(place, logits[rows].clone(), target[rows], fields[rows])
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal(a[rows], b)
    shifted = torch.empty(6 * 4 * vocab + 1, dtype=dtype, device=place.device)[1:].view(6, 4, vocab)
    moved = gradient_and_logp(place, shifted.copy_(logits), target, fields)
    for a, b in zip(whole, moved, strict=True):
        assert torch.equal(a, b)
