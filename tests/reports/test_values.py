"""Rounding and extreme values."""

from __future__ import annotations

import math

import pytest
import torch

import unirl_kernels as uk
from tests.reports.calls import DTYPES, EPS, close, exact, gradient, of_every_backend, one_token, statistics
from tests.runners import Runner
from unirl_kernels.objectives.ratios import BOUND
from unirl_kernels.testing import oracle


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_a_sure_target(dtype: torch.dtype, overwrite: bool, runner: Runner) -> None:
    """As p_y -> 1 the target's entry, p_y - 1, is small. Read, corrected and written back in bf16 it is wrong by up to
    100 % at p_y = 0.999: https://github.com/linkedin/Liger-Kernel/pull/1329,
    https://github.com/linkedin/Liger-Kernel/pull/1419, https://github.com/NVIDIA/TransformerEngine/pull/3193
    """
    row = torch.randn(4, 300)
    row[:, 0] = torch.tensor([8.0, 10.0, 12.0, 16.0])
    logits, batch = one_token(row.to(dtype), runner)
    rest = torch.logsumexp(logits.double()[..., 1:], -1)
    expected = -torch.sigmoid(rest - logits.double()[..., 0]) / len(row)
    found = gradient(logits, batch, uk.sft(), runner.plan(overwrite_logits=overwrite))[..., 0].double()
    # Half an ulp of the result, and two of lse in fp32, from which it comes.
    lse = torch.logsumexp(logits.double(), -1)
    allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 2 * EPS * lse / len(row)
    assert ((found - expected).abs() <= allowed).all()


@of_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logp_is_never_positive(dtype: torch.dtype, runner: Runner) -> None:
    """Log-probabilities of 123 made rewards collapse: https://github.com/verl-project/verl/issues/2656. Rounded up to
    0.06 they make ratios above 1 from nothing: https://github.com/AI-Hypercomputer/maxtext/pull/5231.
    """
    row = torch.randn(8, 1001)
    row[:, 0] = torch.linspace(5, 60, 8)
    logits, batch = one_token(row.to(dtype), runner)
    _, stats = statistics(logits, batch.target, runner)
    assert (stats.logp <= 0).all()
    assert (stats.entropy >= 0).all()
    expected = oracle.log_probs(logits.double(), batch.target)
    torch.testing.assert_close(stats.logp.detach().double(), expected, rtol=0, atol=1e-5)


@of_every_backend
@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
def test_shifted_logits(shift: float, runner: Runner) -> None:
    """A running maximum that starts at 0 lets everything underflow where all logits lie below -88:
    https://github.com/verl-project/verl/pull/7439
    """
    row = torch.randint(-16, 16, (2, 300)).float() / 4  # so that the shift is exact
    target = torch.tensor([[3], [7]])
    leaf, stats = statistics((row + shift).unsqueeze(1), target, runner)
    found = [stats.logp, stats.entropy, *torch.autograd.grad((stats.logp + stats.entropy).sum(), leaf)]
    unshifted = row.double().unsqueeze(1).requires_grad_()
    expected = [oracle.log_probs(unshifted, target), oracle.entropy(unshifted)]
    expected += torch.autograd.grad((expected[0] + expected[1]).sum(), unshifted)
    for got, truth in zip(found, expected, strict=True):
        close(got, truth)


@of_every_backend
def test_a_large_common_offset(runner: Runner) -> None:
    """z_y - lse loses what both have in common, a loss made from the rounded lse is wrong at an offset of 2^20:
    https://github.com/pytorch/pytorch/pull/195829
    """
    row = torch.randint(-16, 16, (3, 1, 200)).float() / 4
    target = torch.tensor([[3], [7], [0]])
    leaf, stats = statistics(row + 2.0**20, target, runner)
    logp, entropy, slope = exact(row, target)
    close(stats.logp, logp)
    close(stats.entropy, entropy)
    close(torch.autograd.grad(stats.logp.sum(), leaf)[0], slope)


@of_every_backend
def test_entropy_of_impossible_tokens(runner: Runner) -> None:
    """0 * -inf is NaN where p log p is computed as written: https://github.com/huggingface/trl/issues/7221"""
    row = torch.full((1, 1, 300), -math.inf)
    row[..., :4] = torch.tensor([1.0, 0.5, 0.0, -1.0])
    leaf, stats = statistics(row, torch.zeros(1, 1, dtype=torch.int64), runner)
    (d_logits,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    few = row[..., :4].double().requires_grad_()
    expected = oracle.entropy(few)
    close(stats.entropy, expected)
    close(d_logits[..., :4], *torch.autograd.grad(expected.sum(), few))
    assert not d_logits[..., 4:].any()


@of_every_backend
def test_entropy_of_half_precision_extremes(runner: Runner) -> None:
    """Finite fp16 logits of +-65504 have probabilities of 0, too: https://github.com/huggingface/trl/pull/7224"""
    row = torch.tensor([[[65504.0, -65504.0]]], dtype=torch.float16)
    leaf, stats = statistics(row, torch.zeros(1, 1, dtype=torch.int64), runner)
    d_logits = torch.autograd.grad((stats.entropy + stats.logp).sum(), leaf)[0]
    assert stats.entropy.item() == stats.logp.item() == 0
    assert not d_logits.any()


@of_every_backend
def test_gradient_of_an_entropy_with_zeros(runner: Runner) -> None:
    """p (log p + H) is 0 * -inf in the backward, too: https://github.com/ByteDance-Seed/VeOmni/pull/720"""
    row = torch.tensor([[[0.0, -200.0, 0.0, -math.inf, -90.0]]])
    leaf, stats = statistics(row, torch.zeros(1, 1, dtype=torch.int64), runner)
    (d_logits,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    assert d_logits.isfinite().all()
    assert stats.entropy.item() == pytest.approx(math.log(2))


@of_every_backend
def test_logits_in_bf16_are_not_rounded_again(runner: Runner) -> None:
    """A log-softmax in bf16 over 150,000 tokens is off by 0.03 in a log-probability, which makes the ratio of a policy
    to itself another number than 1: https://github.com/OpenRLHF/OpenRLHF/pull/634
    """
    logits, target = (3 * torch.randn(2, 2, 4001)).bfloat16(), torch.randint(0, 4001, (2, 2))
    _, stats = statistics(logits, target, runner)
    close(stats.logp, exact(logits, target)[0], size=10)


def test_the_ratio_of_a_policy_to_itself_is_one(runner: Runner) -> None:
    """Statistics without a gradient and with one came by ways of different precision:
    https://github.com/jingyaogong/minimind/pull/813
    """
    logits, batch = one_token((3 * torch.randn(5, 700)).bfloat16(), runner, advantage=1.0)
    with torch.no_grad():
        old_logp = uk.token_stats(logits, batch.target, plan=uk.Plan(runner.backend)).logp
    sampled = uk.Batch(batch.target, batch.advantage, old_logp)
    out = uk.fused_loss(logits.requires_grad_(), sampled, uk.ppo(), plan=runner.plan())
    assert out.metrics["ratio_mean"].item() == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_probabilities_do_not_depend_on_the_micro_batch(batch_size: int) -> None:
    """log_prob and old_log_prob differ on policy when micro-batches do: https://github.com/verl-project/verl/issues/6280"""
    logits, target = torch.randn(6, 5, 3001), torch.randint(0, 3001, (6, 5))
    whole = uk.token_stats(logits, target).logp
    parts = [uk.token_stats(x, y).logp for x, y in zip(logits.split(batch_size), target.split(batch_size), strict=True)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_ratio_that_overflows_with_no_advantage(runner: Runner) -> None:
    """exp of a large log-ratio is inf, and inf * 0 NaN: https://github.com/radixark/miles/pull/1363"""
    logits, batch = one_token(torch.zeros(1, 4), runner, advantage=0.0, old_logp=-200.0)
    leaf = logits.clone().requires_grad_()
    out = uk.fused_loss(leaf * 1, batch, uk.ppo(), plan=runner.plan())
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.item() == 0
    assert not d_logits.any()


def test_a_reference_far_away(runner: Runner) -> None:
    """The k3 estimate of the KL divergence overflows where reference and policy have drifted apart:
    https://github.com/huggingface/trl/issues/3015, https://github.com/OpenRLHF/OpenRLHF/pull/1335
    """
    row = torch.tensor([[-30.0, 0.0, 0.0], [-300.0, 0.0, 0.0]])
    logits, batch = one_token(row, runner, advantage=0.0, ref_logp=-0.5)
    leaf = logits.clone().requires_grad_()
    out = uk.fused_loss(leaf * 1, batch, uk.grpo(beta=1e-12), plan=runner.plan())
    near = -0.5 + 30 + math.log(2)
    values = [1e-12 * (math.expm1(d) - d) for d in (near, BOUND)]
    assert out.loss.item() == pytest.approx(sum(values) / 2, rel=1e-4)
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    assert d_logits[0, 0, 0].item() == pytest.approx(-1e-12 * math.expm1(near) / 2, rel=1e-4)
    assert not d_logits[1].any()


def test_a_small_gradient_survives_fp16(runner: Runner) -> None:
    """A gradient of 1e-8 is 0 in fp16 before the loss scale has multiplied it:
    https://github.com/engichang1467/Open-Rig3R/issues/35
    """
    if runner.kernel != "composed":
        pytest.skip("named kernels round when they make the gradient, as documented")
    logits, batch = one_token(torch.zeros(1, 8, dtype=torch.float16), runner)
    leaf = logits.clone().requires_grad_()
    loss = 1e-8 * uk.sft()
    out = uk.fused_loss(leaf * 1, batch, loss, plan=uk.Plan(runner.backend))
    (out.loss * 2.0**16).backward()
    assert leaf.grad[0, 0, 0].item() == pytest.approx(-7 / 8 * 1e-8 * 2**16, rel=1e-3)
