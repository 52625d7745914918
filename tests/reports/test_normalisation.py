"""What losses are divided by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.reports.calls import close, exact, gradient

LENGTHS = (4, 1, 2, 3)


def ragged() -> tuple[Tensor, Tensor]:
    logits, target = torch.randn(4, 4, 9), torch.randint(0, 9, (4, 4))
    for row, length in zip(target, LENGTHS, strict=True):
        row[length:] = uk.IGNORE
    return logits, target


def accumulated(aggregation: object, *, sizes: tuple[int, ...] = (1, 3)) -> tuple[Tensor, Tensor]:
    """Gradients of one batch, and of its parts one after another."""
    logits, target = ragged()
    loss = uk.Loss(uk.ppo().objective, aggregation)
    fields = torch.randn(4)
    whole = gradient(logits, uk.Batch(target, fields), loss)
    parts = zip(logits.split(sizes), target.split(sizes), fields.split(sizes), strict=True)
    return whole, torch.cat([gradient(x, uk.Batch(y, a), loss) for x, y, a in parts])


@pytest.mark.parametrize(
    "aggregation",
    [uk.TokenMean(sum(LENGTHS)), uk.SequenceMean(4), uk.FixedLength(5, 4)],
    ids=lambda a: type(a).__name__,
)
def test_micro_batches_add_up_to_the_batch(aggregation: object) -> None:
    """The mean of means of micro-batches is not the mean of the batch:
    https://github.com/huggingface/transformers/pull/34191, https://github.com/verl-project/verl/issues/7321,
    https://github.com/agentscope-ai/Trinity-RFT/pull/336
    """
    whole, parts = accumulated(aggregation)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)


def test_a_mean_of_its_own_depends_on_the_micro_batch() -> None:
    """Without a count each micro-batch has a mean of its own, which is what
    https://github.com/unslothai/unsloth-zoo/pull/1023 found four times too large or small: the count has to be given.
    """
    whole, parts = accumulated(uk.TokenMean())
    assert not torch.allclose(whole, parts)


def test_a_micro_batch_of_nothing_adds_nothing() -> None:
    """A micro-batch whose samples are all masked still counted in the divisor:
    https://github.com/NVIDIA-NeMo/RL/issues/212
    """
    logits, target = ragged()
    target[0] = uk.IGNORE
    loss = uk.Loss(uk.sft().objective, uk.TokenMean(6))
    empty, rest = (
        uk.fused_loss(x, uk.Batch(y), loss).loss
        for x, y in zip(logits.split((1, 3)), target.split((1, 3)), strict=True)
    )
    assert empty.item() == 0
    close(rest, uk.fused_loss(logits, uk.Batch(target), loss).loss)


def test_a_constant_length_and_a_mean_over_sequences() -> None:
    """The sum over sequences in place of their mean makes a gradient grow with the micro-batch:
    https://github.com/verl-project/verl/issues/3741
    """
    logits, target = ragged()
    logp, *_ = exact(logits, target)
    total = -torch.where(target != uk.IGNORE, logp, 0).sum()
    loss = uk.Loss(uk.sft().objective, uk.FixedLength(100))
    close(uk.fused_loss(logits, uk.Batch(target), loss).loss, total / (4 * 100))


def test_the_mean_over_sequences_of_means() -> None:
    """GRPO's mean was taken over all tokens of the batch: https://github.com/linkedin/Liger-Kernel/pull/628"""
    logits, target = ragged()
    logp, *_ = exact(logits, target)
    expected = -torch.stack([logp[i, :n].mean() for i, n in enumerate(LENGTHS)]).mean()
    close(uk.fused_loss(logits, uk.Batch(target, torch.ones(4)), uk.Loss(uk.rft().objective)).loss, expected)


@pytest.mark.parametrize(("empty", "count"), [("count", 4), ("skip", 3)])
def test_sequences_without_tokens(empty: str, count: int) -> None:
    """Whether a sequence without tokens counts differs between trainers; either has to be said, and neither is NaN:
    https://github.com/verl-project/verl/pull/6349
    """
    logits, target = ragged()
    target[1] = uk.IGNORE
    logp, *_ = exact(logits, target)
    means = [logp[i, :n].mean() for i, n in enumerate(LENGTHS) if i != 1]
    loss = uk.Loss(uk.sft().objective, uk.SequenceMean(empty=empty))
    close(uk.fused_loss(logits, uk.Batch(target), loss).loss, -torch.stack(means).sum() / count)


def test_an_entropy_bonus_has_its_own_mean() -> None:
    """The bonus was divided by what the policy's loss was divided by: https://github.com/huggingface/trl/pull/6648"""
    logits, target = ragged()
    logp, entropy, _ = exact(logits, target)
    used = target != uk.IGNORE
    loss = uk.Loss(uk.sft().objective, uk.FixedLength(100)) - 0.1 * uk.Loss(lambda t: t.entropy, uk.TokenMean())
    expected = -logp[used].sum() / 400 - 0.1 * entropy[used].mean()
    close(uk.fused_loss(logits, uk.Batch(target), loss).loss, expected)


def test_groups_of_equal_rewards() -> None:
    """A group's standard deviation of 0 divides 0 by 0, and groups are not the whole batch:
    https://github.com/XU-YIJIE/grpo-flat/issues/2
    """
    advantages = uk.group_advantages(torch.tensor([1.0, 1.0, 0.0, 2.0]), 2)
    assert advantages[:2].tolist() == [0, 0]
    close(advantages[2:], torch.tensor([-1.0, 1.0]) / (2**0.5 + 1e-4))


def test_the_length_of_a_pair_is_that_of_what_counts() -> None:
    """Log-ratios were divided by a length that counted a token that was not in the sum:
    https://github.com/huggingface/trl/issues/6879, https://github.com/PaddlePaddle/PaddleFormers/issues/4908
    """
    logits, target = ragged()
    target[0, 0] = uk.IGNORE
    logp, *_ = exact(logits, target)
    mean = [logp[i][target[i] != uk.IGNORE].mean() for i in range(4)]
    batch = uk.Batch(target, ref_logp=torch.zeros(4, 4))
    value = uk.fused_loss(logits, batch, uk.dpo(0.5, length_normalized=True)).loss
    margins = 0.5 * torch.stack([mean[0] - mean[2], mean[1] - mean[3]])
    close(value, -torch.nn.functional.logsigmoid(margins).mean())


def test_the_sum_of_a_pair_is_the_default() -> None:
    """Mean and sum of a sequence's log-ratio are two losses that are taken for one another:
    https://github.com/allenai/open-instruct/issues/483, https://github.com/modelscope/ms-swift/pull/9925
    """
    logits, target = ragged()
    logp, *_ = exact(logits, target)
    total = [logp[i, :n].sum() for i, n in enumerate(LENGTHS)]
    batch = uk.Batch(target, ref_logp=torch.zeros(4, 4))
    margins = 0.5 * torch.stack([total[0] - total[2], total[1] - total[3]])
    close(uk.fused_loss(logits, batch, uk.dpo(0.5)).loss, -torch.nn.functional.logsigmoid(margins).mean(), size=4)
