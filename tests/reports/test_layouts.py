"""Shapes, strides and sizes."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from tests.reports.calls import close, exact, gradient, head_of, of_every_backend, one_token, packed, statistics
from tests.runners import Runner
from unirl_kernels.testing import oracle


@pytest.mark.parametrize("vocab", [1, 2, 255, 257, 1187, 2049, 9496])
def test_no_column_is_left_out(vocab: int, runner: Runner) -> None:
    """A kernel for multiples of 256 is wrong for the others: https://github.com/verl-project/verl/issues/2899. Here
    the last columns weigh as much as the first; 9496 is Qwen's vocabulary over 16 GPUs.
    """
    logits, batch = one_token(torch.zeros(1, vocab), runner, advantage=1.0)
    found = gradient(logits, batch, uk.ppo(), runner.plan()).cpu().view(-1)
    expected = torch.full((vocab,), 1 / vocab)
    expected[0] -= 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@of_every_backend
@pytest.mark.parametrize("vocab", [1, 7, 130, 1000])
def test_columns_beyond_the_vocabulary_count_nothing(vocab: int, runner: Runner) -> None:
    """A tile's columns beyond the end were logits of 0, which shows where all others are far below:
    https://github.com/verl-project/verl/pull/5349
    """
    row = torch.full((1, 1, vocab), -40.0)
    _, stats = statistics(row, torch.zeros(1, 1, dtype=torch.int64), runner)
    expected = -torch.tensor(float(vocab)).log()
    close(stats.logp.view(()), expected, size=1)
    close(stats.entropy.view(()), -expected, size=1)


def test_a_sequence_of_more_than_65535_tokens(runner: Runner) -> None:
    """A grid's second dimension ends there: https://github.com/linkedin/Liger-Kernel/pull/1294"""
    if runner.interpreted or runner.emulated:
        pytest.skip("65537 rows take the interpreter half an hour, the emulator two minutes")
    logits = torch.randn(1, 65537, 3)
    batch = uk.Batch(torch.randint(0, 3, (1, 65537)), torch.tensor([1.0]))
    batch = uk.Batch(batch.target.to(runner.device), batch.advantage.to(runner.device))
    found = gradient(logits.to(runner.device), batch, uk.ppo(), runner.plan())
    expected = oracle.gradient("ppo", logits.to(runner.device).double(), batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_row_beyond_two_to_the_31_elements(backend: str) -> None:
    """row * stride wraps around in 32 bits: https://github.com/huggingface/trl/pull/7266,
    https://github.com/pytorch/pytorch/issues/111484. Memory between the two rows is never touched.
    """
    far = 2**31 + 17
    memory = torch.empty(far + 64, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 50), (far, 1))
    rows = torch.randn(2, 50).bfloat16()
    logits.copy_(rows)
    target = torch.tensor([3, 49])
    leaf = logits.detach().requires_grad_()
    stats = uk.token_stats(leaf, target, plan=uk.Plan(backend))
    logp, _, slope = exact(rows, target)
    close(stats.logp, logp)
    (d_logits,) = torch.autograd.grad(stats.logp.sum(), leaf)
    torch.testing.assert_close(d_logits.double(), slope, rtol=2**-8, atol=1e-6)


@of_every_backend
def test_transposed_logits(runner: Runner) -> None:
    """[S, B, V] turned to [B, S, V] has stride 1 in the last dimension and another row stride than V:
    https://github.com/NVIDIA/TransformerEngine/issues/2734
    """
    logits, target = torch.randn(4, 2, 8), torch.randint(0, 8, (2, 4))
    leaf, stats = statistics(logits.transpose(0, 1), target, runner)
    logp, _, slope = exact(logits.transpose(0, 1), target)
    close(stats.logp, logp)
    close(torch.autograd.grad(stats.logp.sum(), leaf)[0], slope)


@of_every_backend
@pytest.mark.parametrize("layout", ["sliced", "padded", "expanded", "unaligned"])
def test_logits_of_other_strides(layout: str, runner: Runner) -> None:
    """Slices and expanded rows are refused or read at the wrong positions: https://github.com/unslothai/unsloth/pull/10713,
    https://github.com/NVIDIA-NeMo/Automodel/pull/3854
    """
    target = torch.randint(0, 33, (2, 3))
    logits = {
        "sliced": torch.randn(2, 4, 33)[:, :-1],
        "padded": torch.randn(2, 3, 40)[..., :33],
        "expanded": torch.randn(1, 1, 33).expand(2, 3, 33),
        "unaligned": torch.randn(2 * 3 * 33 + 1)[1:].view(2, 3, 33),
    }[layout]
    leaf, stats = statistics(logits, target, runner)
    logp, _, slope = exact(logits, target)
    close(stats.logp, logp)
    close(torch.autograd.grad(stats.logp.sum(), leaf)[0], slope)


@of_every_backend
def test_a_strided_target(runner: Runner) -> None:
    """Targets with a stride were read as if they had none: https://github.com/pytorch/pytorch/issues/67167,
    https://github.com/pytorch/pytorch/issues/72120
    """
    logits, target = torch.randn(2, 3, 33), torch.randint(0, 33, (2, 6))[:, ::2]
    _, stats = statistics(logits, target, runner)
    close(stats.logp, exact(logits, target)[0])


@of_every_backend
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_upstream_gradients_of_any_strides(layout: str, runner: Runner) -> None:
    """A (B, 1) upstream gradient that is indexed as if it were (B, L) is read beyond its end: the luspo loss of
    https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/ops/grpo_loss.py
    """
    logits, target = torch.randn(2, 3, 33), torch.randint(0, 33, (2, 3))
    one_each = torch.tensor([[2.0], [-3.0]], device=runner.device)
    upstream = one_each.expand(2, 3) if layout == "expanded" else one_each.expand(2, 3).t().contiguous().t()
    assert not upstream.is_contiguous()
    found = []
    for d_logp in (upstream, upstream.contiguous()):
        leaf, stats = statistics(logits, target, runner)
        found.append(torch.autograd.grad((stats.logp, stats.entropy), leaf, (d_logp, d_logp))[0])
    assert torch.equal(*found)
    assert found[0][1].abs().sum() > found[0][0].abs().sum() > 0


def test_a_sequence_of_one_token_between_others() -> None:
    """Boundaries that are found where positions fall merge a sequence of one token with the next:
    https://github.com/modelscope/ms-swift/pull/9904
    """
    logits, target = torch.randn(6, 9), torch.randint(0, 9, (6,))
    logp, *_ = exact(logits, target)
    value = uk.fused_loss(logits, packed(target, 3, 1, 1, 1), uk.sft()).loss
    close(value, -(logp[:3].mean() + logp[3] + logp[4] + logp[5]) / 4)


def test_packed_sequences_weigh_as_padded_ones() -> None:
    """The mean over a packed row weighs a short sequence less than the mean over sequences does:
    https://github.com/linkedin/Liger-Kernel/issues/329
    """
    logits, target = torch.randn(9, 11), torch.randint(0, 11, (9,))
    logp, *_ = exact(logits, target)
    value = uk.fused_loss(logits, packed(target, 7, 2), uk.sft()).loss
    close(value, -(logp[:7].mean() + logp[7:].mean()) / 2)
    by_tokens = uk.fused_loss(logits, packed(target, 7, 2), uk.Loss(uk.sft().objective, uk.TokenMean())).loss
    close(by_tokens, -logp.mean())


def test_targets_do_not_cross_the_ends_of_sequences() -> None:
    """A roll over a batch gives the last token of a sequence the first of the next as target:
    https://github.com/verl-project/verl/issues/6475, https://github.com/pytorch/torchtitan/pull/4075
    """
    ids = torch.tensor([[10, 11, 12], [20, 21, 22]])
    assert uk.shift_targets(ids).tolist() == [[11, 12, uk.IGNORE], [21, 22, uk.IGNORE]]


def test_a_batch_without_tokens() -> None:
    """A micro-batch with nothing in it is NaN or crashes: https://github.com/EleutherAI/bergson/pull/461"""
    hidden, weight, _ = head_of(0)
    weight.requires_grad_()
    logits = torch.randn(2, 0, 7, requires_grad=True)
    out = uk.fused_loss(logits, uk.Batch(torch.zeros(2, 0, dtype=torch.int64)), uk.sft())
    (d_logits,) = torch.autograd.grad(out.loss, logits)
    assert out.loss.item() == 0
    assert d_logits.shape == (2, 0, 7)
    of_head = uk.fused_linear_loss(hidden, weight, packed(torch.zeros(0, dtype=torch.int64)), uk.sft())
    (d_weight,) = torch.autograd.grad(of_head.loss, weight)
    assert of_head.loss.item() == 0
    assert not d_weight.any()
