"""Ratios that would overflow: an advantage of 0 gives exactly 0, on every path; inside the bound nothing changes."""

from __future__ import annotations

import math

import pytest
import torch

import unirl_kernels as uk
from tests.objectives.hand import tokens
from tests.runners import Runner
from unirl_kernels.objectives import (
    ASPO,
    CISPO,
    DCPO,
    DRPO,
    GMPO,
    GSPO,
    K3,
    KL,
    RLOO,
    SAPO,
    SPO,
    Clip,
    DualClip,
    GSPOToken,
    ImportanceWeighted,
    MaskedCISPO,
    Objective,
    PolicyGradient,
    Ratio,
    Scaled,
    SequenceSAPO,
    SimplePPO,
    TruncatedRatio,
    TwoSidedClip,
)
from unirl_kernels.objectives.ratios import BOUND, k3, ratio

OF_TOKENS = [
    *(Ratio(), Clip(), DualClip(), TwoSidedClip(), PolicyGradient(kl=None), SAPO(), SPO(), DRPO(), SimplePPO(), ASPO()),
    *(DCPO(), CISPO(), MaskedCISPO(), Scaled(Ratio(), TruncatedRatio(against="old_logp", of="logp", high=9.0))),
]
OF_SEQUENCES = [GSPO(), GSPOToken(), SequenceSAPO(), RLOO(), GMPO()]


@pytest.mark.parametrize("objective", [*OF_TOKENS, *OF_SEQUENCES], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("distance", [100.0, -100.0])
def test_no_advantage_no_loss(objective: Objective, distance: float, runner: Runner) -> None:
    """A stale token whose ratio is e^100 or e^-100, its advantage 0: a group of equal rewards."""
    if runner.interpreted and (not isinstance(objective, (Clip, SPO)) or distance < 0):
        pytest.skip("the program is what other backends run")
    if runner.kernel != "composed" and objective in OF_SEQUENCES:
        pytest.skip("composed only")
    logits = torch.randn(2, 2, 7, device=runner.device)
    logits[..., 0] += min(distance, 0)
    target = torch.zeros(2, 2, dtype=torch.int64, device=runner.device)
    logp = torch.log_softmax(logits, -1)[..., 0]
    batch = uk.Batch(target, advantage=torch.zeros(2, device=runner.device), old_logp=(logp - distance).clamp(max=0))
    for dtype in (torch.float32, torch.float16):
        leaf = logits.to(dtype).requires_grad_()
        out = uk.fused_loss(leaf, batch, uk.Loss(objective), plan=runner.plan())
        (d_logits,) = torch.autograd.grad(out.loss, leaf)
        assert out.loss.item() == 0
        assert not d_logits.any()
        assert all(x.isfinite() for x in out.metrics.values())
        assert uk.fused_loss(leaf.detach(), batch, uk.Loss(objective), plan=runner.plan()).loss.item() == 0


def test_linear_heads_too() -> None:
    hidden, weight, target = torch.randn(2, 2, 5), torch.randn(7, 5), torch.zeros(2, 2, dtype=torch.int64)
    logp = uk.linear_token_stats(hidden, weight, target).logp
    batch = uk.Batch(target, advantage=torch.zeros(2), old_logp=logp - 100)
    for objective in (*OF_TOKENS, *OF_SEQUENCES):
        leaf = hidden.clone().requires_grad_()
        loss = uk.fused_linear_loss(leaf, weight, batch, uk.Loss(objective)).loss
        loss.backward()
        assert loss.item() == 0
        assert not leaf.grad.any()
        assert uk.fused_linear_loss(hidden, weight, batch, uk.Loss(objective)).loss.item() == 0


def test_inside_the_bound_nothing_changes() -> None:
    assert ratio(torch.tensor([-BOUND, BOUND], dtype=torch.float64)).tolist() == [math.exp(-BOUND), math.exp(BOUND)]
    just_inside = math.nextafter(BOUND, 0)  # at the bound itself the slope of clamp is 1 or 0, by torch's release
    for x in (-just_inside, -3.0, 0.0, 0.5, just_inside):
        log_ratio = torch.tensor(float(x), dtype=torch.float64, requires_grad=True)
        r = ratio(log_ratio)
        (slope,) = torch.autograd.grad(r, log_ratio)
        assert r.item() == slope.item() == math.exp(x)


def test_beyond_the_bound_ratios_are_constant_and_finite() -> None:
    log_ratio = torch.tensor([-1e4, -41.0, 41.0, 1e4], requires_grad=True)
    r = ratio(log_ratio)
    (slope,) = torch.autograd.grad(r.sum(), log_ratio)
    assert torch.equal(r, torch.tensor([-40.0, -40.0, 40.0, 40.0]).exp())
    assert not slope.any()
    assert torch.square(r).isfinite().all()


def test_k3_is_bounded_from_above_alone() -> None:
    """Where pi_ref / pi vanishes the estimate is d's size: its gradient must not vanish there."""
    d = torch.tensor([-100.0, 100.0], requires_grad=True)
    values = k3(d)
    (slope,) = torch.autograd.grad(values.sum(), d)
    torch.testing.assert_close(values, torch.tensor([99.0, math.exp(BOUND) - BOUND - 1]))
    torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("penalty", [KL(1.0), K3(), ImportanceWeighted(K3())])
def test_penalties_are_finite(penalty: Objective) -> None:
    t = tokens([1e-30, 1.0], old=[1.0, 1e-30], ref=[1.0, 1e-30])
    assert penalty(t).isfinite().all()
