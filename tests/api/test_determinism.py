"""The same bits when a call is repeated, and for a row in every batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.runners import Runner

LOSS = uk.Loss(uk.grpo().objective, uk.TokenMean(16))


def gradient_and_logp(runner: Runner, logits: Tensor, target: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    batch = uk.Batch(target, *fields.unbind(-1))
    out = uk.fused_loss(leaf, batch, LOSS, plan=runner.plan())
    return torch.autograd.grad(out.loss, leaf)[0], out.logp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [33, 5003])
def test_bits_depend_on_the_row_alone(vocab: int, dtype: torch.dtype, runner: Runner) -> None:
    if runner.backend == "eager":
        pytest.skip("torch chooses how to add by the shape of the whole tensor")
    if runner.interpreted and (vocab == 33) != (dtype == torch.bfloat16):
        pytest.skip("two of the four cases show it; a row is slow under the interpreter")
    n, length = (4, 1) if runner.interpreted else (6, 4)
    logits = (torch.randn(n, length, vocab) * 3).to(dtype).to(runner.device)
    target = torch.randint(0, vocab, (n, length)).to(runner.device)
    fields = (-3 * torch.rand(n, length, 3)).to(runner.device)
    whole = gradient_and_logp(runner, logits, target, fields)
    again = gradient_and_logp(runner, logits, target, fields)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    for rows in (slice(2, 3), slice(1, 3), slice(n - 1, n)):
        alone = gradient_and_logp(runner, logits[rows].clone(), target[rows], fields[rows])
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal(a[rows], b)
    shifted = torch.empty(n * length * vocab + 1, dtype=dtype, device=runner.device)[1:].view(n, length, vocab)
    moved = gradient_and_logp(runner, shifted.copy_(logits), target, fields)
    for a, b in zip(whole, moved, strict=True):
        assert torch.equal(a, b)
