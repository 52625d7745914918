"""Second backward, memory, checkpointing, compilation, wrappers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unirl_kernels as uk
from tests.reports.calls import close, exact, head_of, one_token, packed
from tests.runners import Runner


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_backward_is_right_or_refused(overwrite: bool, runner: Runner) -> None:
    """A gradient that was scaled in place is scaled again: https://github.com/Dao-AILab/quack/pull/209"""
    logits, batch = one_token(torch.randn(2, 33), runner, advantage=1.0)
    leaf = logits.clone().requires_grad_()
    value = 3 * uk.fused_loss(leaf * 1, batch, uk.ppo(), plan=runner.plan(overwrite_logits=overwrite)).loss
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    first = first.clone()
    try:
        (second,) = torch.autograd.grad(value, leaf)
    except RuntimeError:
        assert overwrite, "a kept graph must serve again"
    else:
        torch.testing.assert_close(second, first)


def test_a_second_backward_of_a_head() -> None:
    """The same, of the weight's gradient, with two upstream gradients: https://github.com/Dao-AILab/quack/pull/209"""
    hidden, weight, target = head_of()
    weight.requires_grad_()
    out = uk.fused_linear_loss(hidden, weight, packed(target), uk.sft())
    found = [torch.autograd.grad(out.loss, weight, torch.tensor(s), retain_graph=True)[0] for s in (3.0, -2.0, 1.0)]
    torch.testing.assert_close(found[0] / 3, found[2])
    torch.testing.assert_close(found[1] / -2, found[2])


def test_a_leaf_is_never_overwritten(runner: Runner) -> None:
    """An in-place default destroys a leaf's data: https://github.com/linkedin/Liger-Kernel/issues/343"""
    logits, batch = one_token(torch.randn(2, 33), runner, advantage=1.0)
    leaf = logits.clone().requires_grad_()
    uk.fused_loss(leaf, batch, uk.ppo(), plan=runner.plan()).loss.backward()
    assert torch.equal(leaf.detach(), logits)
    with pytest.raises(ValueError, match="leaf"):
        uk.fused_loss(leaf, batch, uk.ppo(), plan=runner.plan(overwrite_logits=True))
    assert torch.equal(leaf.detach(), logits)


def test_what_saved_the_logits_still_has_them(runner: Runner) -> None:
    """Logits that were overwritten without a word are what softmax or tanh saved for its own backward:
    https://github.com/linkedin/Liger-Kernel/pull/1251, https://github.com/linkedin/Liger-Kernel/pull/273
    """
    logits, batch = one_token(torch.randn(2, 33), runner)
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(uk.fused_loss(torch.tanh(leaf), batch, uk.sft(), plan=runner.plan()).loss, leaf)
    double = logits.double().requires_grad_()
    log_p = torch.log_softmax(torch.tanh(double), -1)[..., 0]
    (expected,) = torch.autograd.grad(-log_p.mean(), double)
    close(found, expected)


def test_two_losses_of_the_same_logits(runner: Runner) -> None:
    """The first backward wrote its gradient where the second loss has its logits:
    https://github.com/unslothai/unsloth/issues/5002
    """
    logits, batch = one_token(torch.randn(2, 33), runner)
    leaf = logits.clone().requires_grad_()
    computed = leaf * 1
    both = uk.fused_loss(computed, batch, uk.sft(), plan=runner.plan()).loss + (computed**2).sum()
    (found,) = torch.autograd.grad(both, leaf)
    close(found, -exact(logits, batch.target)[2] / 2 + 2 * logits.double().cpu(), size=4)


def test_overwritten_logits_are_not_read_for_metrics(runner: Runner) -> None:
    """Metrics were computed from logits that held a gradient by then: https://github.com/unslothai/unsloth/issues/5002"""
    logits, batch = one_token(torch.randn(2, 33), runner)
    computed = logits.clone().requires_grad_() * 1
    out = uk.fused_loss(computed, batch, uk.sft(), plan=runner.plan(overwrite_logits=True))
    if runner.kernel == "composed":  # the gradient is made in the backward
        out.loss.backward()
    assert computed.numel() == 0
    close(out.logp, exact(logits, batch.target)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """A forward that runs again finds its input overwritten: https://github.com/unslothai/unsloth/issues/5002"""
    hidden, weight, target = head_of()
    found = []
    for wrap in (False, True):
        leaf = hidden.clone().requires_grad_()

        def loss_of(x: Tensor) -> Tensor:
            return uk.fused_loss(x @ weight.t(), packed(target), uk.sft(), plan=uk.Plan(overwrite_logits=True)).loss

        value = checkpoint(loss_of, leaf, use_reentrant=reentrant) if wrap else loss_of(leaf)
        value.backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    """A function whose backward uses what its forward kept gives wrong second derivatives without a word:
    https://github.com/pytorch/pytorch/issues/76185, https://github.com/pytorch/pytorch/issues/58509
    """
    logits, target = torch.randn(2, 3, 9, requires_grad=True), torch.randint(0, 9, (2, 3))
    stats = uk.token_stats(logits, target)
    with pytest.raises(RuntimeError, match="gradients cannot be differentiated again"):
        torch.autograd.grad(stats.logp.sum(), logits, create_graph=True)


@pytest.mark.slow
def test_compiled_with_ignored_tokens() -> None:
    """Compiled, the loss was three times too large where a token was ignored:
    https://github.com/linkedin/Liger-Kernel/pull/1338
    """
    hidden, weight, target = head_of()
    target[::2] = uk.IGNORE

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return uk.fused_linear_loss(x, weight, packed(y), uk.sft()).loss

    with torch.no_grad():
        eager, compiled = loss_of(hidden, target), torch.compile(loss_of, backend="aot_eager")(hidden, target)
    torch.testing.assert_close(compiled, eager)


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 17, bias=False)

    def forward(self, hidden: Tensor, target: Tensor) -> uk.LossOutput:
        return uk.fused_linear_loss(hidden, self.head.weight, packed(target), uk.sft())


def test_wrappers_find_the_tensors_of_an_output() -> None:
    """DistributedDataParallel with a static graph passes over outputs of a kind that it does not know, and leaves
    gradients unsynchronised: https://github.com/huggingface/transformers/issues/25357,
    https://github.com/pytorch/pytorch/pull/93125
    """
    hidden, _, target = head_of()
    leaves, spec = torch.utils._pytree.tree_flatten(Scored()(hidden, target))
    assert any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    out = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert out.loss.requires_grad
    assert set(out.metrics) == {"entropy", "ratio_mean"}


def test_a_frozen_policy_gets_no_gradient_and_the_same_value() -> None:
    """Without a gradient another path gave another value: https://github.com/jingyaogong/minimind/pull/812"""
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    batch = uk.Batch(target, torch.ones(2), ref_logp=-torch.rand(2, 3))
    with_gradient = uk.fused_loss(logits.clone().requires_grad_(), batch, uk.grpo()).loss
    with torch.no_grad():
        without = uk.fused_loss(logits, batch, uk.grpo()).loss
    assert not without.requires_grad
    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-6, atol=0)
    assert not uk.fused_loss(logits, batch, uk.grpo()).loss.requires_grad


def test_a_loss_value_without_a_gradient() -> None:
    """Logits that require no gradient gave a loss of 0: https://github.com/linkedin/Liger-Kernel/issues/507"""
    logits, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    value = uk.fused_loss(logits, packed(target), uk.sft()).loss
    close(value, -exact(logits, target)[0].mean())


def test_a_resumed_run_continues_with_the_same_loss() -> None:
    """A loss that holds a model of its own went on with the untrained one after a restart:
    https://github.com/huggingface/sentence-transformers/pull/2648. A loss here is a value.
    """
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    batch = uk.Batch(target, torch.ones(2), ref_logp=-torch.rand(2, 3))
    loss = uk.grpo(0.3, 0.1)
    first = uk.fused_loss(logits, batch, loss).loss
    for again in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert again == loss
        assert torch.equal(uk.fused_loss(logits, batch, again).loss, first)
