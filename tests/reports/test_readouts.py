"""Temperature, softcap and scale of logits."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from tests.reports.calls import EPS, close, head_of, of_every_backend, statistics
from tests.runners import Runner
from unirl_kernels.testing import oracle


def check(logits: torch.Tensor, target: torch.Tensor, runner: Runner, **readout: object) -> None:
    """Log-probabilities, entropies and their gradients against plain PyTorch on the mapped logits."""
    leaf, stats = statistics(logits, target, runner, **readout)
    (found,) = torch.autograd.grad((stats.logp + stats.entropy).sum(), leaf)
    plain = logits.double().requires_grad_()
    given = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in readout.items()}
    z = oracle.apply_readout(plain, **given)
    logp, entropy = oracle.log_probs(z, target), oracle.entropy(z)
    (expected,) = torch.autograd.grad((logp + entropy).sum(), plain)
    size = max(1.0, z.abs().max().item())
    close(stats.logp, logp, size=size)
    close(stats.entropy, entropy, size=size)
    close(found, expected, size=size * max(1.0, expected.abs().max().item()))


@of_every_backend
def test_a_softcap(runner: Runner) -> None:
    """The softcap was forgotten, or was not the softcap: https://github.com/apple/ml-cross-entropy/issues/48,
    https://github.com/unslothai/unsloth-zoo/pull/593, https://github.com/verl-project/verl/pull/7991
    """
    check(60 * torch.randn(2, 2, 33), torch.randint(0, 33, (2, 2)), runner, softcap=30.0)


@of_every_backend
@pytest.mark.parametrize("vocab", [3, 33, 300])
def test_a_softcap_and_columns_beyond_the_vocabulary(vocab: int, runner: Runner) -> None:
    """Columns beyond the end, -inf before the softcap, are -softcap behind it and gain probability:
    https://github.com/unslothai/unsloth/pull/10616
    """
    check(torch.full((1, 1, vocab), -500.0), torch.zeros(1, 1, dtype=torch.int64), runner, softcap=1.0)


@of_every_backend
@pytest.mark.parametrize("scale", [0.125, 1 / 16])
def test_a_scale(scale: float, runner: Runner) -> None:
    """Cohere multiplies logits and Granite divides them; fused paths did neither:
    https://github.com/unslothai/unsloth/pull/11277, https://github.com/vllm-project/vllm/pull/52158
    """
    check(20 * torch.randn(2, 2, 33), torch.randint(0, 33, (2, 2)), runner, scale=scale)


@of_every_backend
def test_a_temperature(runner: Runner) -> None:
    """Log-probabilities of the loss were taken without the temperature that samples were drawn with:
    https://github.com/huggingface/trl/pull/3029, https://github.com/radixark/miles/pull/68
    """
    check(3 * torch.randn(2, 2, 33), torch.randint(0, 33, (2, 2)), runner, temperature=0.6)


@of_every_backend
def test_a_temperature_for_each_token(runner: Runner) -> None:
    """A batch drawn at several temperatures was scored at one: https://github.com/allenai/open-instruct/pull/1678"""
    temperature = torch.tensor([[0.5, 1.0], [2.0, 0.7]], device=runner.device)
    check(3 * torch.randn(2, 2, 33), torch.randint(0, 33, (2, 2)), runner, temperature=temperature)


def test_the_readout_reaches_the_head() -> None:
    """The fused head dropped what the layer behind it does to its logits: https://github.com/verl-project/verl/pull/7991,
    https://github.com/unslothai/unsloth/pull/11277
    """
    hidden, weight, target = head_of()
    readout = uk.Readout(temperature=0.7, softcap=2.0, scale=0.5)
    stats = uk.linear_token_stats(hidden, weight, target, readout=readout)
    expected = uk.token_stats(hidden @ weight.t(), target, readout=readout)
    for got, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    plain = uk.linear_token_stats(hidden, weight, target)
    assert (plain.logp - stats.logp).abs().max() > 1e3 * EPS


def test_the_configuration_of_a_model_is_read_whole() -> None:
    """Every family names its scale in its own way, and one that is not known must not be passed over:
    https://github.com/vllm-project/vllm/pull/52158
    """
    transformers = pytest.importorskip("transformers")
    from unirl_kernels.integrations.transformers import readout_of

    gemma = transformers.PretrainedConfig(final_logit_softcapping=30.0)
    assert readout_of(gemma).softcap == 30
    assert readout_of(transformers.PretrainedConfig(logit_scale=0.125)).scale == 0.125
    assert readout_of(transformers.PretrainedConfig(logits_scaling=16.0)).scale == 1 / 16
