"""Calls that must raise an error instead of returning a number."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from tests.reports.calls import head_of, of_every_backend, packed, statistics
from tests.runners import Runner


@of_every_backend
@pytest.mark.parametrize("bad", [-1, -4, 9])
def test_a_target_outside_the_vocabulary(bad: int, runner: Runner) -> None:
    """It was trained on as if it were ignored, or as another token: https://github.com/pytorch/torchtitan/pull/4297,
    https://github.com/pytorch/pytorch/issues/12670, https://github.com/pytorch/pytorch/issues/135546
    """
    target = torch.tensor([[1, 2, 3], [4, bad, 5]])
    if runner.device == "cpu":
        with pytest.raises(IndexError, match=r"target must lie in \[0, 9\)"):
            statistics(torch.randn(2, 3, 9), target, runner)
    else:
        _, stats = statistics(torch.randn(2, 3, 9), target, runner)
        assert stats.logp.isnan().sum() == 1


def test_a_target_outside_the_vocabulary_of_a_head() -> None:
    """The one-hot term was never subtracted, and a loss came back: https://github.com/axolotl-ai-cloud/axolotl/pull/3767"""
    hidden, weight, target = head_of()
    target[3] = 17
    with pytest.raises(IndexError, match=r"target must lie in \[0, 17\)"):
        uk.fused_linear_loss(hidden, weight, packed(target), uk.sft())


def test_targets_that_are_already_shifted() -> None:
    """Labels were shifted twice, and the token after the next was learned:
    https://github.com/huggingface/transformers/issues/47394, https://github.com/huggingface/transformers/pull/46898
    """
    from unirl_kernels.integrations.transformers import causal_lm_loss

    logits, ids = torch.randn(1, 5, 9), torch.randint(0, 9, (1, 5))
    shifted = uk.shift_targets(ids)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(causal_lm_loss(logits, ids, 9), expected)
    torch.testing.assert_close(causal_lm_loss(logits, None, 9, shift_labels=shifted), expected)
    torch.testing.assert_close(uk.fused_loss(logits, uk.Batch(shifted), uk.sft()).loss, expected)


def test_a_field_of_another_length() -> None:
    """Advantages of sequences and log-probabilities of tokens were broadcast against each other:
    https://github.com/teilomillet/textpolicy/pull/21
    """
    target = torch.randint(0, 9, (2, 3))
    with pytest.raises(ValueError, match=r"advantage must have shape \(2,\) or \(2, 3\), got \(3,\)"):
        uk.Batch(target, torch.ones(3))
    with pytest.raises(ValueError, match=r"old_logp must have shape \(2, 3\), got \(2, 2\)"):
        uk.Batch(target, old_logp=torch.zeros(2, 2))


def test_a_group_of_one() -> None:
    """The standard deviation of one reward is NaN: https://github.com/verl-project/verl/pull/3635"""
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        uk.group_advantages(torch.ones(4), 1)


def test_what_a_kernel_does_not_run_is_said() -> None:
    """The fused path left out what it could not do: https://github.com/unslothai/unsloth-zoo/pull/665,
    https://github.com/unslothai/unsloth/pull/11277
    """
    logits, target = torch.randn(2, 3, 9, requires_grad=True), torch.randint(0, 9, (2, 3))
    batch = uk.Batch(target, ref_logp=torch.zeros(2, 3))
    rows, lgamma = uk.Plan("cpu", "rows"), uk.Loss(lambda t: torch.lgamma(1 - t.logp))
    with pytest.raises(uk.UnsupportedOperation, match="lgamma"):
        uk.fused_loss(logits * 1, batch, lgamma, plan=rows)
    with pytest.raises(ValueError, match="kernel must be 'composed' for a pair-scope objective"):
        uk.fused_loss(logits * 1, batch, uk.dpo(), plan=rows)
