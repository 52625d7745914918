"""logp <= 0 and H >= 0, whatever the readout rounds."""

from __future__ import annotations

import pytest
import torch

import unirl_kernels as uk
from tests.linear import NATIVE
from tests.runners import Runner

READOUTS = [{"scale": 3.0, "softcap": 5.0, "temperature": 0.1}, {"softcap": 30.0}, {"temperature": 0.01}, {}]


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("runner", NATIVE, ids=str)
def test_log_probabilities_and_entropies(readout: dict[str, float], runner: Runner) -> None:
    hidden, weight = torch.randn(2000, 64), torch.randn(3, 64) * 2
    logits = hidden @ weight.T
    target, how = logits.argmax(-1), {"readout": uk.Readout(**readout), "plan": uk.Plan(runner.backend)}
    out = uk.fused_loss(logits[None].requires_grad_(), uk.Batch(target[None]), uk.sft(), **how)
    for stats in (out, uk.token_stats(logits, target, **how), uk.linear_token_stats(hidden, weight, target, **how)):
        assert bool((stats.logp <= 0).all())
        assert bool((stats.entropy >= 0).all())
        assert not torch.log(-torch.expm1(stats.logp)).isnan().any()
