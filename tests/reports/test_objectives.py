"""Gradients of objectives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.reports.calls import close, exact, gradient, one_token
from tests.runners import Runner
from unirl_kernels.testing import oracle


def two_sided(t: object) -> Tensor:
    """The clip with a bound for negative advantages, too (INTELLECT-2): -min(min(r, delta) A, clip(r) A)."""
    ratio = torch.exp(t.logp - t.old_logp)
    return -torch.minimum(ratio.clamp(max=1.1) * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage)


# On each side of each bound, for both signs of the advantage: -d loss / d logp by hand, r A where the ratio's own
# gradient flows, 0 where a bound holds. delta = 1.1 lies below 1 + 0.2.
RATIOS = (0.5, 1.05, 1.15, 1.5)
COEFFICIENTS = {
    "ppo": {2.0: (1.0, 2.1, 2.3, 0.0), -2.0: (0.0, -2.1, -2.3, -3.0)},
    "two_sided": {2.0: (1.0, 2.1, 0.0, 0.0), -2.0: (0.0, -2.1, -2.3, 0.0)},
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_every_side_of_the_clip(name: str, runner: Runner) -> None:
    """With delta below 1 + high the backward took the wrong branch for a negative advantage:
    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/grpo_loss.py
    """
    loss = {"ppo": uk.ppo(0.2), "two_sided": uk.Loss(two_sided)}[name]
    for advantage, coefficients in COEFFICIENTS[name].items():
        rows = torch.randn(len(RATIOS), 17)
        old_logp = torch.log_softmax(rows, -1)[:, 0] - torch.tensor(RATIOS).log()
        logits, batch = one_token(rows, runner, advantage=advantage, old_logp=old_logp)
        one_hot = torch.nn.functional.one_hot(torch.zeros(len(RATIOS), dtype=torch.int64), 17)
        gc = torch.tensor(coefficients, dtype=torch.float64).unsqueeze(-1)
        expected = gc * (torch.softmax(rows.double(), -1) - one_hot) / len(RATIOS)
        found = gradient(logits, batch, loss, runner.plan()).double().cpu().squeeze(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_ratio_used_twice_is_differentiated_twice(runner: Runner) -> None:
    """The gradient through the ratio that the corrected KL shares with the surrogate was forgotten:
    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/grpo_loss.py
    """

    def corrected(t: object) -> Tensor:
        ratio, gap = torch.exp(t.logp - t.old_logp), t.ref_logp - t.logp
        return -ratio * t.advantage + ratio * (torch.exp(gap) - gap - 1)

    logits, batch = one_token(torch.randn(1, 17), runner, advantage=0.7, old_logp=-3.0, ref_logp=-2.0)
    leaf = logits.double().requires_grad_()
    fields = {"old_logp": batch.old_logp, "ref_logp": batch.ref_logp, "advantage": batch.advantage}
    t = type("t", (), {"logp": oracle.log_probs(leaf, batch.target), **fields})
    (expected,) = torch.autograd.grad(corrected(t).sum(), leaf)
    found = gradient(logits, batch, uk.Loss(corrected), runner.plan())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_entropy_bonus_has_a_gradient(runner: Runner) -> None:
    """The bonus was made of entropies without a gradient: it moved the loss and nothing else:
    https://github.com/huggingface/trl/pull/5595, https://github.com/huggingface/trl/pull/6140
    """
    logits, batch = one_token(torch.tensor([[2.0, 0.0, -1.0]]), runner)
    found = gradient(logits, batch, uk.Loss(lambda t: -t.entropy), runner.plan())
    leaf = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(-oracle.entropy(leaf).sum(), leaf)
    close(found, expected)
    assert expected.abs().max() > 0.1


def test_on_policy_the_ratio_is_one_and_has_a_gradient(runner: Runner) -> None:
    """Where old log-probabilities are the policy's own, exp(logp - logp) is 1 and its gradient must not vanish:
    https://github.com/huggingface/trl/issues/2752
    """
    logits, batch = one_token(torch.randn(1, 9), runner, advantage=2.0)
    leaf = logits.clone().requires_grad_()
    out = uk.fused_loss(leaf * 1, batch, uk.ppo(), plan=runner.plan())
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.item() == pytest.approx(-2)
    close(d_logits, -2 * exact(logits, batch.target)[2], size=2)


def test_the_sign_of_the_kl_penalty(runner: Runner) -> None:
    """log pi_ref - log pi and its negative are taken for one another: https://github.com/Liuziyu77/Visual-RFT/issues/40"""
    logits, batch = one_token(torch.zeros(1, 2), runner, advantage=0.0, ref_logp=-0.1)
    d_logits = gradient(logits, batch, uk.grpo(beta=1.0), runner.plan()).flatten()
    # The reference finds the token more probable than the policy does: the penalty raises it.
    assert d_logits[0] < 0 < d_logits[1]
    gap = -0.1 - torch.tensor(0.5).log()
    close(d_logits[0], (1 - gap.exp()) * 0.5, size=1)


class SequenceRatio:
    """GSPO, Zheng et al. 2025 (arXiv:2507.18071), eq. 5."""

    scope = "sequence"

    def __call__(self, t: object) -> Tensor:
        ratio = t.to_tokens(torch.exp(t.sequence_mean(t.logp - t.old_logp)))
        return -torch.minimum(ratio * t.advantage, ratio.clamp(0.9, 1.1) * t.advantage)


def test_the_ratio_of_a_sequence_gives_every_token_its_share() -> None:
    """A ratio of sequences centred over the batch, and one whose gradient reaches one token alone, were called GSPO:
    https://github.com/MakazhanAlpamys/Soup/issues/723, https://github.com/huggingface/trl/issues/3811
    """
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    target[1, 2] = uk.IGNORE
    logp, _, slope = exact(logits, target)
    used = target != uk.IGNORE
    lengths = used.sum(-1)
    old_logp = (logp + 0.02).float()
    ratio = torch.exp(torch.where(used, logp - old_logp, 0).sum(-1) / lengths)
    batch = uk.Batch(target, torch.tensor([1.0, -2.0]), old_logp)
    found = gradient(logits, batch, uk.Loss(SequenceRatio()))
    share = -(torch.tensor([1.0, -2.0]) * ratio / (2 * lengths)).view(2, 1, 1)
    close(found, share * torch.where(used.unsqueeze(-1), slope, 0))


def test_ratios_of_tokens_are_not_multiplied() -> None:
    """Ratios of whole sequences were taken where the loss is of tokens:
    https://github.com/rasbt/reasoning-from-scratch/issues/243
    """
    logits, target = torch.randn(1, 4, 9), torch.randint(0, 9, (1, 4))
    logp, *_ = exact(logits, target)
    ratios = torch.tensor([[0.5, 1.1, 1.3, 0.9]])
    batch = uk.Batch(target, torch.ones(1), (logp - ratios.log()).float())
    close(uk.fused_loss(logits, batch, uk.ppo(0.2)).loss, -torch.tensor([0.5, 1.1, 1.2, 0.9]).mean(), size=4)


def test_an_advantage_for_each_token() -> None:
    """Advantages of tokens met a loss that expected one per sequence: https://github.com/teilomillet/textpolicy/pull/21"""
    logits, target = torch.randn(2, 3, 9), torch.randint(0, 9, (2, 3))
    advantage = torch.randn(2, 3)
    found = gradient(logits, uk.Batch(target, advantage), uk.ppo())
    close(found, -advantage.unsqueeze(-1) / 6 * exact(logits, target)[2], size=2)


def test_an_objective_of_ones_own_is_not_replaced() -> None:
    """A variant fell back to the usual loss when an input was missing:
    https://github.com/MakazhanAlpamys/Soup/issues/584
    """
    logits, target = torch.randn(2, 3, 9, requires_grad=True), torch.randint(0, 9, (2, 3))
    variant = uk.Loss(lambda t: -(t.logp - t.old_logp) * t.reward)
    with pytest.raises(ValueError, match=r"the objective reads t\.reward, but batch\.fields has none"):
        uk.fused_loss(logits * 1, uk.Batch(target), variant)
    reward = torch.randn(2)
    found = gradient(logits, uk.Batch(target, fields={"reward": reward}), variant)
    close(found, -reward.view(2, 1, 1) / 6 * exact(logits, target)[2], size=2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_leaves_ignored_tokens_out(smoothing: float) -> None:
    """The uniform part of a smoothed loss took ignored tokens, too: https://github.com/pytorch/pytorch/issues/73205,
    https://github.com/linkedin/Liger-Kernel/pull/198
    """
    logits, target = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    target[:, 3] = uk.IGNORE
    seen = uk.token_observations(logits, target)
    used = target != uk.IGNORE
    loss = -(1 - smoothing) * seen.logp - smoothing * (seen.mean_logit - seen.lse)
    expected = torch.nn.functional.cross_entropy(logits[used].double(), target[used], label_smoothing=smoothing)
    close(loss.sum() / used.sum(), expected, size=4)
    assert not loss[~used].any()


def test_a_penalty_on_the_normaliser_leaves_ignored_tokens_out() -> None:
    """The mean of the squared log-normaliser counted ignored tokens: https://github.com/allenai/OLMo/pull/760"""
    logits, target = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    target[:, 2:] = uk.IGNORE
    leaf = logits.double().requires_grad_()
    (torch.logsumexp(leaf, -1) ** 2)[target != uk.IGNORE].mean().backward()
    loss = uk.Loss(lambda t: t.lse**2, uk.TokenMean())
    close(gradient(logits, uk.Batch(target), loss), leaf.grad, size=4)
