"""What objectives log, worked by hand; the names beside them are TRL's and verl's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import unirl_kernels as uk
from tests.objectives.hand import L, tokens
from tests.objectives.test_by_hand import FOUR_AND_ONE, PAIR, SIDES
from unirl_kernels import objectives as uo

BELOW, ABOVE = [0, 0, 0, 1], [1, 0, 0, 0]
CLIPS = {
    "clip_fraction": [1, 0, 0, 1],  # TRL clip_ratio/region_mean, verl pg_clipfrac
    "clip_fraction/low": BELOW,  # TRL clip_ratio/low_mean
    "clip_fraction/high": ABOVE,  # TRL clip_ratio/high_mean
    "ppo_kl": [-L, -L, L, L],  # verl ppo_kl
}
REWARDS = {
    "rewards/chosen": [L],
    "rewards/rejected": [-L],
    "rewards/margins": [2 * L],
    "rewards/accuracies": [1],
    "logps/chosen": [-L],
    "logps/rejected": [-2 * L],
}

TABLE: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (uo.Reinforce(), SIDES, {"ppo_kl": [-L, -L, L, L]}),
    (uo.Ratio(), SIDES, {"ppo_kl": [-L, -L, L, L]}),
    (uo.Clip(), SIDES, CLIPS),
    (uo.PolicyGradient(), SIDES, CLIPS),
    (uo.TwoSidedClip(), SIDES, CLIPS),
    (uo.ASPO(), SIDES, CLIPS),
    (uo.DualClip(c=1.5), SIDES, CLIPS | {"clip_fraction/dual": [0, 1, 0, 0]}),  # verl pg_clipfrac_lower
    (uo.SAPO(), SIDES, {"ppo_kl": [-L, -L, L, L]}),
    (
        uo.CISPO(0.8, 1.5),
        SIDES,
        {
            "clip_fraction": [1, 1, 1, 1],  # verl pg_clipfrac
            "clip_fraction/high": ABOVE,  # TRL cispo_clip_ratio
            "ppo_kl": [-L, -L, L, L],
        },
    ),
    (
        uo.Scaled(uo.CISPO(0, 20), uo.TrustTV(0.2, 0.2)),
        SIDES,
        {
            "clip_fraction": [0] * 4,
            "clip_fraction/high": [0] * 4,
            "ppo_kl": [-L, -L, L, L],
            "weight": [0, 1, 1, 0],
            "masked_fraction": [1, 0, 0, 1],  # verl pg_clipfrac of dppo
        },
    ),
    (
        uo.WithAdvantage(uo.Reinforce(), uo.TeacherAdvantage()),
        {"p": [1 / 2], "old": [1 / 4], "teacher": [1 / 2]},
        {"ppo_kl": [-L], "advantage": [L]},
    ),
    (
        uo.GSPO(0.2, 0.2),
        FOUR_AND_ONE | {"advantage": [1.0]},
        {
            "clip_fraction": [1, 1],
            "clip_fraction/low": [0, 0],
            "clip_fraction/high": [1, 1],
            "ppo_kl": [-2 * L, 0],
        },
    ),
    (
        uo.GMPO(0.4, 0.5),
        FOUR_AND_ONE | {"advantage": [1.0]},
        {
            "clip_fraction": [1, 0],
            "clip_fraction/low": [0, 0],
            "clip_fraction/high": [1, 0],
            "ppo_kl": [-2 * L, 0],
        },
    ),
    (
        uo.VESPO(),
        {"p": [1 / 2], "old": [1 / 4], "advantage": [1.0]},
        {"phi": [4 * math.exp(-3)], "ppo_kl": [-L]},  # TRL vespo/phi_seq_mean
    ),
    (
        uo.ClipCov(least=0.5, most=1.0),
        {"p": [1, 1 / 4], "advantage": [1.0, -1.0]},
        {"clip_fraction": [1, 1], "ppo_kl": [0, 0]},
    ),
    (uo.KLCov(), SIDES, {"ppo_kl": [L, L, L, L]}),
    (
        uo.A2PO(1.0),
        {"p": [1 / 2], "ref": [1 / 4], "reward": [2.0], "value": [0.5]},
        {"implicit_reward": [L], "advantage": [1.5]},
    ),
    (uo.DPO(1.0), PAIR, REWARDS),
    (uo.Hinge(1.0), PAIR, REWARDS),
    (uo.ChosenNLL(), PAIR, {"nll_loss": [L]}),
    (
        uo.SimPO(2.0),
        PAIR,
        REWARDS | {"rewards/chosen": [-2 * L], "rewards/rejected": [-4 * L], "rewards/margins": [2 * L]},
    ),
    (uo.OPD(), {"p": [1 / 2], "teacher": [1]}, {"teacher_kl": [-L]}),
    (uo.SampledReverseKL(), {"p": [1 / 2], "teacher": [1]}, {"teacher_kl": [-L]}),
    (uo.SDAR(1.0), {"p": [1 / 2], "teacher": [1]}, {"gate": [2 / 3], "teacher_kl": [-L]}),
    (uo.SFT(), {"p": [1 / 2]}, {}),
]


@pytest.mark.parametrize(("objective", "given", "expected"), TABLE, ids=lambda x: repr(x) if callable(x) else "")
def test_metrics(objective: Any, given: dict[str, Any], expected: dict[str, list[float]]) -> None:
    found = objective.metrics(tokens(**given))
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name].double(), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-7, msg=name
        )


def test_of_judged_sequences_each_kind_counts_for_itself() -> None:
    """Two desirable sequences and one that is not: means over either, and what a reduction over ranks needs."""
    logits = torch.zeros(3, 1, 4)
    ref = torch.log(torch.tensor([[1 / 8], [1 / 2], [1 / 8]]))
    fields = {"label": torch.tensor([True, True, False]), "kl": torch.tensor(0.5)}
    batch = uk.Batch(torch.zeros(3, 1, dtype=torch.int64), ref_logp=ref, fields=fields)
    out = uk.fused_loss(logits, batch, uk.Loss(uo.KTO(1.0)))
    assert out.metrics["rewards/chosen"].item() == pytest.approx(0, abs=1e-6)
    assert out.metrics["rewards/rejected"].item() == pytest.approx(L)
    assert out.metrics["logps/chosen"].item() == pytest.approx(-2 * L)
    assert out.metrics["reference_kl"].item() == pytest.approx(0.5)
    parts = out.metric_parts["rewards/chosen"]
    assert (parts.sum.item(), parts.count.item()) == pytest.approx((0, 2), abs=1e-6)
    assert (parts.min.item(), parts.max.item()) == pytest.approx((-L, L))


def test_terms_of_a_sum_log_side_by_side() -> None:
    """Two objectives that log the same name are told apart; each term has its own value."""
    logits = torch.randn(2, 3, 5)
    target = torch.zeros(2, 3, dtype=torch.int64)
    batch = uk.Batch(target, torch.tensor([1.0, -1.0]), torch.full((2, 3), -2.0), torch.full((2, 3), -1.5))
    loss = uk.ppo() + 0.5 * uk.Loss(uo.K3(), uk.TokenMean()) + uk.Loss(uo.Clip(0.1, 0.1))
    out = uk.fused_loss(logits, batch, loss)
    assert {"clip_fraction", "clip_fraction.2", "kl", "entropy"} <= set(out.metrics)
    torch.testing.assert_close(torch.stack(out.terms).sum(), out.loss)
    torch.testing.assert_close(out.terms[1], 0.5 * out.metrics["kl"])
