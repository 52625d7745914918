"""Padding, prompts, and whatever stands at ignored positions."""

from __future__ import annotations

import math

import pytest
import torch

import unirl_kernels as uk
from tests.reports.calls import close, exact, gradient, head_of, of_every_backend, packed, statistics
from tests.runners import Runner

NOTHING = torch.full((2, 3), uk.IGNORE)


@of_every_backend
def test_upstream_gradients_at_padding_are_ignored(runner: Runner) -> None:
    """The sum of upstream gradients over a sequence took the padding's, too: loss of sequence level in
    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/grpo_loss.py
    """
    logits, target = torch.randn(2, 3, 33), torch.randint(0, 33, (2, 3))
    target[0, 2] = target[1, 0] = uk.IGNORE
    used = (target != uk.IGNORE).to(runner.device)
    found = []
    for upstream in (used.float(), torch.where(used, 1.0, 1e30), torch.where(used, 1.0, math.nan)):
        leaf, stats = statistics(logits, target, runner)
        found.append(torch.autograd.grad(stats.logp, leaf, upstream)[0])
    assert not found[0][~used].any()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nothing_to_learn_from_is_zero(runner: Runner) -> None:
    """A mean over no tokens is 0 / 0: https://github.com/pytorch/pytorch/issues/116349,
    https://github.com/unslothai/unsloth/pull/7677, https://github.com/NVIDIA-NeMo/Automodel/pull/3797
    """
    logits = torch.randn(2, 3, 9, device=runner.device, requires_grad=True)
    for aggregation in (uk.SequenceMean(), uk.TokenMean(), uk.FixedLength(7), uk.SequenceMean(empty="skip")):
        loss = uk.Loss(uk.sft().objective, aggregation)
        out = uk.fused_loss(logits * 1, uk.Batch(NOTHING.to(runner.device)), loss, plan=runner.plan())
        (d_logits,) = torch.autograd.grad(out.loss, logits)
        assert out.loss.item() == 0
        assert not d_logits.any()


def test_a_count_of_all_ranks_that_is_zero() -> None:
    """A global count of 0 divides 0 by 0: https://github.com/unslothai/unsloth-zoo/pull/1286"""
    logits = torch.randn(2, 3, 9, requires_grad=True)
    loss = uk.Loss(uk.sft().objective, uk.TokenMean(torch.tensor(0.0)))
    out = uk.fused_loss(logits * 1, uk.Batch(NOTHING), loss)
    assert out.loss.item() == 0
    assert not torch.autograd.grad(out.loss, logits)[0].any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_under_the_mask_does_not_reach_the_loss(garbage: float, runner: Runner) -> None:
    """NaN times a mask of 0 is NaN: https://github.com/verl-project/verl/pull/6349"""
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    fields = {"advantage": torch.randn(2, 3), "old_logp": -torch.rand(2, 3), "ref_logp": -torch.rand(2, 3)}
    target[:, -1] = uk.IGNORE
    dirty = {name: x.clone().index_fill_(1, torch.tensor(2), garbage) for name, x in fields.items()}
    dirty_logits = logits.clone().index_fill_(1, torch.tensor(2), garbage)
    found = []
    for x, given in ((logits, fields), (dirty_logits, dirty)):
        batch = uk.Batch(target.to(runner.device), **{name: value.to(runner.device) for name, value in given.items()})
        found.append(gradient(x.to(runner.device), batch, uk.grpo(), runner.plan()))
    assert torch.equal(*found)
    assert not found[1][:, -1].any()


def test_hidden_states_of_padding_may_be_anything() -> None:
    """A product with a gradient of 0 does not remove inf or NaN from the weight's gradient:
    https://github.com/verl-project/verl/pull/6349
    """
    hidden, weight, target = head_of()
    target[4:] = uk.IGNORE
    hidden[4] = math.nan
    hidden[5] = math.inf
    found = []
    for tokens in (6, 4):
        leaf, w = hidden[:tokens].clone().requires_grad_(), weight.clone().requires_grad_()
        out = uk.fused_linear_loss(leaf, w, packed(target[:tokens]), uk.sft())
        found.append(torch.autograd.grad(out.loss, (leaf, w)))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0][:4], found[1][0])
    assert not found[0][0][4:].any()


def test_padding_is_marked_not_guessed() -> None:
    """Where padding is found by its token, an end of sequence with the same token is lost:
    https://github.com/huggingface/trl/pull/4970
    """
    end = 2
    ids, mask = torch.tensor([[5, 6, end, end]]), torch.tensor([[0, 1, 1, 0]])
    assert uk.shift_targets(ids, mask).tolist() == [[6, end, uk.IGNORE, uk.IGNORE]]


def test_metrics_leave_padding_out() -> None:
    """KL and entropy of a report summed over the padding: https://github.com/huggingface/trl/issues/6803"""
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    target[0, 1:] = uk.IGNORE
    batch = uk.Batch(target, torch.ones(2), ref_logp=-torch.rand(2, 3))
    out = uk.fused_loss(logits, batch, uk.grpo())
    logp, entropy, _ = exact(logits, target)
    used = target != uk.IGNORE
    difference = (batch.ref_logp - logp)[used]
    close(out.metrics["entropy"], entropy[used].mean())
    close(out.metrics["kl"], (torch.expm1(difference) - difference).mean(), size=4)


def test_a_masked_token_does_not_move_the_others() -> None:
    """A mean over the batch before the mask lets padding change the loss of others:
    https://github.com/MakazhanAlpamys/Soup/issues/723
    """
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    target[1, 2] = uk.IGNORE
    old_logp, moved = -torch.rand(2, 3), -torch.rand(2, 3)
    moved[target != uk.IGNORE] = old_logp[target != uk.IGNORE]
    found = [gradient(logits, uk.Batch(target, torch.ones(2), x), uk.ppo()) for x in (old_logp, moved)]
    assert torch.equal(*found)


def test_a_mask_is_applied_once() -> None:
    """Tokens that were left out of the sum stayed in the count, which made the loss 17 % too small:
    https://github.com/huggingface/trl/issues/6369, https://github.com/radixark/miles/pull/2796
    """
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    target[1] = uk.IGNORE
    logp, *_ = exact(logits, target)
    value = uk.fused_loss(logits, uk.Batch(target), uk.Loss(uk.sft().objective, uk.TokenMean())).loss
    close(value, -logp[0].mean())
    # A weight of 0 is the way to keep a token in the count.
    kept = torch.randint(0, 9, (2, 3))
    kept[0] = target[0]
    weights = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    loss = uk.Loss(uk.sft().objective, uk.Weighted(uk.TokenMean(), "kept"))
    close(uk.fused_loss(logits, uk.Batch(kept, fields={"kept": weights}), loss).loss, -logp[0].sum() / 6)


def test_gaps_between_what_counts() -> None:
    """Targets of several turns were moved together and met the logits of others:
    https://github.com/modelscope/ms-swift/pull/10186
    """
    logits, target = torch.randn(1, 6, 9), torch.randint(0, 9, (1, 6))
    target[0, [0, 2, 3]] = uk.IGNORE
    stats = uk.token_stats(logits, target)
    used = target != uk.IGNORE
    close(stats.logp[used], exact(logits, target)[0][used])
    assert not stats.logp[~used].any()
