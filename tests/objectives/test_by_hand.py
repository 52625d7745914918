"""Every objective, rule and score with numbers worked by hand: the values of tokens, sequences or pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.objectives.hand import L, tokens
from unirl_kernels import objectives as uo
from unirl_kernels.objectives.arguments import Parameters

log, exp = math.log, math.exp

PAIR = {"p": [1 / 2, 1 / 4], "ref": [1 / 4, 1 / 2]}
"""R of the chosen is log 2, of the rejected -log 2: their difference has sigma 4/5."""

TWICE = {"p": [1 / 2], "old": [1 / 4]}
"""A ratio of 2."""

SIDES = {"p": [1 / 2, 1 / 2, 1 / 4, 1 / 4], "old": [1 / 4, 1 / 4, 1 / 2, 1 / 2], "advantage": [1.0, -1.0, 1.0, -1.0]}
"""Ratios 2, 2, 1/2, 1/2."""

LIKELIHOOD = [
    (uo.SFT(), {"p": [1 / 2, 1]}, [L, 0]),
    (uo.RFT(), {"p": [1 / 2, 1 / 2], "advantage": [1.0, 0.0]}, [L, 0]),
    (uo.OnlineRFT(), {"p": [1 / 2, 1 / 2], "advantage": [1.0, 0.0]}, [L, 0]),
    (uo.DFT(), {"p": [1 / 4]}, [2 * L / 4]),
    (uo.Focal(2.0), {"p": [1 / 2]}, [L / 4]),
    (uo.Unlikelihood(), {"p": [3 / 4]}, [2 * L]),
    (uo.ChordPhi(), {"p": [1 / 4]}, [3 / 16 * 2 * L]),
    (uo.EAFT(2.0), {"p": [1 / 2], "entropy": [1.5]}, [L / 4]),
    (uo.ExcessLoss(0.5), {"p": [1 / 4, 1 / 2], "ref": [1 / 2, 1 / 2]}, [2 * L, 0]),
]

PENALTIES = [
    (uo.KL(0.5), {"p": [1 / 4], "ref": [1 / 2]}, [(1 - L) / 2]),
    (uo.K1(), {"p": [1 / 4], "ref": [1 / 2]}, [-L]),
    (uo.K1("teacher_logp"), {"p": [1 / 2], "teacher": [1 / 4]}, [L]),
    (uo.AbsoluteKL(), {"p": [1 / 4], "ref": [1 / 2]}, [L]),
    (uo.K2(), {"p": [1 / 4], "ref": [1 / 2]}, [L**2 / 2]),
    (uo.K3(), {"p": [1 / 4], "ref": [1 / 2]}, [1 - L]),
    (uo.LowVarianceKL(bound=1.0, most=0.5), {"p": [1 / 8, 1 / 4], "ref": [1 / 2, 1 / 2]}, [0.5, 1 - L]),
    (uo.LowVarianceKL(bound=1.0), {"p": [1 / 8], "ref": [1 / 2]}, [math.e - 2]),
    (uo.StraightThrough(uo.K1(), uo.K2()), {"p": [1 / 4], "ref": [1 / 2]}, [-L]),
    (uo.Entropy(), {"p": [1], "entropy": [1.5]}, [1.5]),
    (uo.EntropyTarget(2.0), {"p": [1], "entropy": [1.5]}, [0.25]),
    (uo.ZLoss(), {"p": [1], "lse": [-3.0]}, [9]),
]

POLICY = [
    (uo.Reinforce(), {"p": [1 / 2], "advantage": [2.0]}, [2 * L]),
    (uo.Ratio(), TWICE | {"advantage": [3.0]}, [-6]),
    (uo.Ratio("rollout_logp"), {"p": [1 / 2], "rollout": [1 / 8], "advantage": [3.0]}, [-12]),
    (uo.Clip(), SIDES, [-1.2, 2, -0.5, 0.8]),
    (uo.DualClip(c=1.5), SIDES, [-1.2, 1.5, -0.5, 0.8]),
    (uo.TwoSidedClip(delta=1.5), SIDES, [-1.2, 1.5, -0.5, 0.8]),
    (uo.PolicyGradient(uo.Ratio(), uo.KL(1.0)), TWICE | {"advantage": [1.0], "ref": [1]}, [-2 + 1 - L]),
    (uo.SAPO(2.0, 1.0), {"p": [1, 1], "old": [1, 1], "advantage": [1.0, -1.0]}, [-1, 2]),
    (uo.SPO(0.5), TWICE | {"advantage": [1.0]}, [-1]),
    (uo.DRPO(0.5), TWICE | {"advantage": [1.0]}, [-2 + 1 / 4]),
    (uo.SimplePPO(1.5), {"p": [1 / 2, 1 / 2], "old": [1 / 4, 1 / 8], "advantage": [3.0, 3.0]}, [-3 * L, 0]),
    (uo.ASPO(c=3.0), SIDES, [0, 2, -2, 0.8]),
    (uo.ASPO(c=1.5), {"p": [1 / 4], "old": [1 / 2], "advantage": [1.0]}, [-1.5]),
    (uo.DCPO(3 / 16, 1 / 2), {"p": [1, 1 / 2], "old": [1 / 4, 1], "advantage": [1.0, -1.0]}, [-2, 0.75]),
]

IMPORTANCE = [
    (uo.CISPO(0, 1.5), TWICE | {"advantage": [1.0]}, [1.5 * L]),
    (uo.CISPO(0.6, 5), {"p": [1 / 4], "old": [1 / 2], "advantage": [1.0]}, [0.6 * 2 * L]),
    (uo.MaskedCISPO(), SIDES, [0, -2 * L, L, 0]),
    (
        uo.TOPR(),
        {"p": [1 / 2, 1 / 2, 1 / 4], "old": [1 / 4, 1 / 4, 1 / 2], "advantage": [1.0] * 3, "reward": [1.0, 0.0, 0.0]},
        [L, L, L],
    ),
    (uo.ShapedLikelihood(0.25), {"p": [1 / 4], "advantage": [2.0]}, [-1]),
    (uo.ImportanceWeighted(uo.K1()), TWICE | {"ref": [1 / 4]}, [2 * L]),
    (uo.ImportanceWeighted(uo.K1(), "logp"), {"p": [1 / 2], "ref": [1 / 4]}, [L]),
]

COMPOSED = [
    (uo.Scaled(uo.SFT(), uo.TruncatedRatio(high=1.5)), {"p": [1 / 2], "old": [1 / 2], "rollout": [1 / 4]}, [1.5 * L]),
    (
        uo.WithAdvantage(uo.Reinforce(), uo.TeacherAdvantage()),
        {"p": [1 / 2], "old": [1 / 4], "teacher": [1 / 2]},
        [L**2],
    ),
    (
        uo.Choose(uo.Flag("expert"), uo.SFT(), uo.Entropy()),
        {"p": [1 / 2] * 2, "entropy": [3.0] * 2, "expert": [1, 0]},
        [L, 3],
    ),
    (uo.Flag("expert"), {"p": [1, 1], "expert": [1, 0]}, [1, 0]),
    (uo.EntropyAbove(1.0), {"p": [1, 1], "entropy": [0.9, 1.1]}, [0, 1]),
]

CORRECTIONS = [
    (
        uo.TruncatedRatio(low=0.8, high=1.5),
        {"p": [1] * 3, "old": [1 / 2, 1 / 2, 1 / 4], "rollout": [1 / 4, 1 / 2, 1 / 2]},
        [1.5, 1, 0.8],
    ),
    (uo.TruncatedRatio("logp", high=9), {"p": [1], "rollout": [1 / 4]}, [4]),
    (
        uo.IcePop(low=0.6, high=1.5),
        {"p": [1] * 3, "old": [1 / 2, 1 / 2, 1 / 4], "rollout": [1 / 4, 1 / 2, 1 / 2]},
        [0, 1, 0],
    ),
    (
        uo.SequenceTruncatedRatio(high=3),
        {"p": [1] * 3, "lengths": [2, 1], "old": [1 / 2] * 3, "rollout": [1 / 4] * 3},
        [3, 3, 2],
    ),
    (
        uo.SequenceIcePop(high=3),
        {"p": [1] * 3, "lengths": [2, 1], "old": [1 / 2] * 3, "rollout": [1 / 4] * 3},
        [0, 0, 2],
    ),
    (
        uo.SequenceMask(low=-1, high=1),
        {"p": [1] * 3, "lengths": [2, 1], "old": [1 / 2] * 3, "rollout": [1 / 4, 1 / 4, 1 / 8]},
        [1, 1, 0],
    ),
    (
        uo.BatchNormalized(uo.TruncatedRatio()),
        {"p": [1, 1], "old": [1 / 2, 1 / 2], "rollout": [1 / 4, 1 / 2]},
        [4 / 3, 2 / 3],
    ),
    (
        uo.OffPolicyMask(0.5),
        {"p": [1 / 4, 1 / 4, 1 / 2], "rollout": [1 / 2] * 3, "advantage": [-1.0, 1.0, -1.0]},
        [0, 1, 1],
    ),
]

TRUST = [
    (uo.TrustTV(0.2, 0.2), SIDES, [0, 1, 1, 0]),
    (uo.TrustBand(0.2), {"p": [1 / 2, 3 / 8], "old": [1 / 4, 1 / 4]}, [0, 1]),
    (uo.TrustKL(0.5, 0.5), {"p": [3 / 4, 3 / 4], "old": [1 / 4, 1 / 4], "advantage": [1.0, -1.0]}, [0, 1]),
    (uo.TrustKL(0.6, 0.6), {"p": [3 / 4], "old": [1 / 4], "advantage": [1.0]}, [1]),
    (uo.OneSide(), SIDES, [0, 1, 1, 0]),
    (
        uo.Ring(),
        {"p": [1 / 2, 1 / 8, 1 / 2, 1 / 2], "old": [1 / 4, 1 / 2, 1 / 8, 1 / 2], "advantage": [1.0, 1.0, -1.0, 1.0]},
        [0, 1, 1, 1],
    ),
    (
        uo.SequenceOneSide(),
        {"p": [1, 1 / 2, 1], "lengths": [2, 1], "old": [1 / 4, 1 / 2, 1], "advantage": [1.0, 1.0]},
        [0, 0, 1],
    ),
]

ADVANTAGES = [
    (uo.EntropyShaped(0.4, 2.0), {"p": [1, 1], "entropy": [1.0, 1.0], "advantage": [1.0, -0.5]}, [1.4, -0.25]),
    (uo.AdvantageWeighted(1.0), {"p": [1], "advantage": [L]}, [2 * L]),
    (uo.SequenceMeanAdvantage(), {"p": [1, 1, 1], "lengths": [2, 1], "advantage": [1.0, 3.0, 5.0]}, [2, 2, 5]),
    (uo.TeacherAdvantage(), {"p": [1], "old": [1 / 4], "teacher": [1 / 2]}, [L]),
    (uo.PrefixWeighted(1.0), {"p": [1 / 4, 1 / 2], "lengths": [2], "teacher": [1 / 2, 1]}, [2 * L, 1.5 * L]),
]

FOUR_AND_ONE = {"p": [1, 1 / 2], "old": [1 / 4, 1 / 2], "lengths": [2]}
"""Ratios 4 and 1 in one sequence: 2 in the mean, 4 in all."""

SEQUENCES = [
    (uo.GSPO(0.2, 0.2), FOUR_AND_ONE | {"advantage": [1.0]}, [-1.2, -1.2]),
    (uo.GSPO(0.2, 0.2), FOUR_AND_ONE | {"advantage": [-1.0]}, [2, 2]),
    (uo.GSPOToken(0.2, 0.2), FOUR_AND_ONE | {"advantage": [1.0, -1.0]}, [-1.2, 2]),
    (uo.SequenceSAPO(2.0, 1.0), {"p": [1, 1 / 4], "old": [1 / 2, 1 / 2], "lengths": [2], "advantage": [1.0]}, [-1, -1]),
    (uo.RLOO(), FOUR_AND_ONE | {"advantage": [-1.0]}, [4, 4]),
    (uo.GMPO(0.4, 0.5), FOUR_AND_ONE | {"advantage": [1.0]}, [-exp(0.25)] * 2),
    (uo.GMPO(0.4, 0.5), FOUR_AND_ONE | {"advantage": [-1.0]}, [2, 2]),
    (uo.VESPO(), TWICE | {"advantage": [1.0]}, [4 * exp(3 - 6) * L]),
    (uo.VESPO(), TWICE | {"advantage": [-1.0]}, [-8 * exp(2 - 4) * L]),
    (uo.FutureKL(0.5, 0, 9), {"p": [1 / 2, 1], "old": [1 / 4, 1 / 4], "lengths": [2], "advantage": [1.0]}, [4, 4]),
    (
        uo.FutureKL(0.5, 0, 9, delta=3),
        {"p": [1 / 2, 1], "old": [1 / 4, 1 / 4], "lengths": [2], "advantage": [1.0]},
        [2, 1],
    ),
    (uo.SequenceImportanceWeighted(uo.K1()), FOUR_AND_ONE | {"ref": [1 / 2, 1 / 2]}, [2 * L, 0]),
]

REGRESSIONS = [
    (uo.A2PO(1.0), {"p": [1 / 2], "ref": [1 / 4], "reward": [2.0], "value": [1.0]}, [(L - 1) ** 2]),
    (uo.FlowRL(1.0), {"p": [1 / 2], "ref": [1 / 4], "reward": [2.0], "log_z": [1.0]}, [(1 + L - 2) ** 2]),
    (
        uo.TrajectoryBalance(1.0),
        {"p": [1 / 2, 1 / 4], "ref": [1 / 4] * 2, "reward": [0.0] * 2, "group": [5, 5]},
        [L**2 / 4] * 2,
    ),
    (uo.SPPO(1.0), {"p": [1 / 2], "ref": [1 / 4], "win_rate": [1.0]}, [(L - 0.5) ** 2]),
]

UNPAIRED = [
    (uo.KTO(1.0, 3.0, 6.0), {"p": [1 / 2] * 2, "ref": [1 / 4] * 2, "label": [1, 0], "kl": 0.0}, [1, 4]),
    (uo.KTO(1.0), {"p": [1 / 2], "ref": [1 / 4], "label": [1], "kl": L}, [0.5]),
    (uo.KTO(1.0), {"p": [1 / 2], "ref": [1 / 4], "label": [1], "kl": -1.0}, [1 / 3]),
    (uo.KTOBatch(1.0), {"p": [1 / 2] * 2, "ref": [1 / 4] * 2, "label": [1, 0]}, [0.5, 0.5]),
    (uo.APOZeroUnpaired(1.0), {"p": [1 / 2] * 2, "ref": [1 / 4] * 2, "label": [1, 0]}, [1 / 3, 2 / 3]),
    (uo.BCO(1.0), {"p": [1 / 2] * 2, "ref": [1 / 4] * 2, "label": [1, 0]}, [log(3 / 2), log(3)]),
    (uo.BCO(1.0, shift=L), {"p": [1 / 2], "ref": [1 / 4], "label": [1]}, [L]),
    (uo.NPO(1.0), {"p": [1 / 2], "ref": [1 / 4]}, [2 * log(3)]),
]

GROUPS = [
    (
        uo.REAL(1.0),
        {"p": [1 / 2] * 3, "old": [1 / 4] * 3, "advantage": [1.0, -1.0, 1.0], "group": [0, 0, 1]},
        [log(3) + log(3 / 2)] * 2 + [0],
    ),
    (
        uo.TargetPolicy(1.0),
        {"p": [1 / 2, 1 / 4], "old": [1 / 2, 1 / 2], "advantage": [0.0, 0.0], "group": [0, 0]},
        [-log(2 / 9) / 2] * 2,
    ),
    (uo.InfoNCA(1.0, 1.0), PAIR | {"reward": [0.0, 0.0], "group": [0, 0]}, [-log(4 / 25) / 2] * 2),
    (uo.PlackettLuce(1.0), PAIR | {"rank": [0, 1], "group": [0, 0]}, [log(5 / 4)] * 2),
    (uo.PlackettLuce(1.0), PAIR | {"rank": [1, 0], "group": [0, 0]}, [log(5)] * 2),
    (uo.TPO(1.0), {"p": [1 / 2, 1 / 4, 1], "rank": [0, 1, 2], "group": [0, 0, 0]}, [log(3 / 2)] * 3),
]

BATCH = [
    (uo.TopEntropy(0.5), {"p": [1] * 4, "entropy": [3.0, 1.0, 4.0, 2.0]}, [1, 0, 1, 0]),
    (uo.TopExcess(0.5), {"p": [1 / 2, 1 / 4, 1 / 8, 1 / 2], "ref": [1] * 4}, [0, 1, 1, 0]),
    (uo.ClipCov(least=0.5, most=1.0), {"p": [1, 1 / 4], "advantage": [1.0, -1.0]}, [0, 0]),
    (uo.ClipCov(least=1.0, most=2.0), {"p": [1, 1 / 4], "advantage": [1.0, -1.0]}, [-1, 1]),
    (
        uo.KLCov(0.4, 3.0),
        {"p": [1, 1 / 2, 1 / 2], "old": [1 / 2] * 3, "advantage": [2.0, 0.0, 1.0]},
        [-4 + 3 * L, 0, -1],
    ),
    (uo.SecondMoment(0.5), {"p": [1 / 2, 1, 1 / 8], "old": [1 / 4] * 3, "advantage": [1.0] * 3}, [1, 0, 1]),
    (uo.SecondMoment(0.3), {"p": [1 / 2, 1, 1 / 8], "old": [1 / 4] * 3, "advantage": [1.0] * 3}, [0, 0, 1]),
]

PREFERENCES = [
    (uo.DPO(1.0), PAIR, [log(5 / 4)]),
    (uo.ConservativeDPO(1.0, 0.25), PAIR, [0.75 * log(5 / 4) + 0.25 * log(5)]),
    (uo.RobustDPO(1.0, 0.25), PAIR, [(0.75 * log(5 / 4) - 0.25 * log(5)) / 0.5]),
    (uo.Hinge(0.5), PAIR, [1 - L]),
    (uo.Hinge(1.0), PAIR, [0]),
    (uo.IPO(1.0), PAIR, [(2 * L - 0.5) ** 2]),
    (uo.EXO(1.0, 0.25), PAIR, [0.8 * log(0.8 / 0.75) + 0.2 * log(0.2 / 0.25)]),
    (uo.NCA(1.0), PAIR, [log(3 / 2) + log(3) / 2 + log(3 / 2) / 2]),
    (uo.BCOPair(1.0), PAIR, [2 * log(3 / 2)]),
    (uo.SPPOHard(1.0), PAIR, [2 * (L - 0.5) ** 2]),
    (uo.APOZero(1.0), PAIR, [2 / 3]),
    (uo.APODown(1.0), PAIR, [2 / 3 + 1 / 5]),
    (uo.DiscoPOP(1.0, 1.0), PAIR, [0.2 * log(5 / 4) + 0.8 / 4]),
    (uo.ShiftedDPO(1.0, 0.5), PAIR, [log(1 + 2**-1.5)]),
    (uo.CalibratedDPO(1.0), PAIR, [log(5 / 4) + 2 * (L - 0.5) ** 2]),
    (uo.DPOPositive(1.0, 5.0), PAIR, [log(5 / 4)]),
    (uo.DPOPositive(1.0, 5.0), {"p": [1 / 4, 1 / 2], "ref": [1 / 2, 1 / 4]}, [log(1 + 2**7)]),
    (uo.SimPO(1.0, L), PAIR, [L]),
    (uo.SimPER(), PAIR, [-1 / 4]),
    (uo.OffsetDPO(1.0, 1.0), PAIR | {"reward": [L, 0.0]}, [log(3 / 2)]),
    (uo.REBEL(1.0), PAIR | {"reward": [1.0, 0.0]}, [(2 * L - 1) ** 2]),
    (uo.ChosenNLL(), PAIR, [L]),
    (uo.OddsRatio(1.0), PAIR, [log(4 / 3)]),
    (uo.OddsRatio(1.0, "answer"), {"p": [1, 1 / 2, 1 / 4], "lengths": [2, 1], "answer": [0, 1, 1]}, [log(4 / 3)]),
    (uo.ORPO(1.0), PAIR, [L + log(4 / 3)]),
    (uo.XPO(1.0, 0.5), PAIR | {"from_reference": [0, 1]}, [log(5 / 4) - L]),
    (uo.AOT(1.0), PAIR, [log(5 / 4)]),
    (uo.AOT(1.0), {"p": [1, 1 / 2, 1 / 2, 1 / 4], "ref": [1 / 2, 1 / 2, 1, 1 / 2]}, [log(5 / 4), log(3 / 2)]),
    (uo.AOTUnpaired(1.0), {"p": [1 / 4, 1, 1 / 2, 1 / 2], "ref": [1 / 4] * 4}, [log(3), log(3 / 2)]),
    (uo.BetaDPO(1.0, 0.5, margin=2 * L), PAIR, [log(5 / 4)]),
    (uo.BetaDPO(1.0, 0.5, margin=2 * L - 2), PAIR, [log(1 + 1 / 16)]),
]

TWO_AND_ONE = {"p": [1 / 2, 1 / 2, 1 / 2], "ref": [1 / 4, 1 / 8, 1 / 4], "lengths": [2, 1]}
"""Log-ratios log 2 and 2 log 2 in the first sequence, log 2 in the second."""

SCORES = [
    (uo.LogRatio(), TWO_AND_ONE, [3 * L, L]),
    (uo.LogRatio("ref_sum"), {"p": [1 / 2, 1 / 2, 1 / 2], "lengths": [2, 1], "ref_sum": [-3 * L, 0.0]}, [L, -L]),
    (uo.MeanLogRatio(), TWO_AND_ONE, [1.5 * L, L]),
    (uo.WeightedLogRatio(), TWO_AND_ONE | {"token_weight": [1.0, 0.5, 0.0]}, [2 * L, 0]),
    (uo.DesensitizedLogRatio(0.5), TWO_AND_ONE, [2 * L, L]),
    (uo.ForwardKL(), PAIR, [1 / 2, -1]),
    (uo.JensenShannon(), PAIR, [log(4 / 3), log(2 / 3)]),
    (uo.AlphaDivergence(2.0), PAIR, [1, -1 / 2]),
    (uo.AlphaDivergence(1.0), PAIR, [L, -L]),
    (uo.ChiSquared(), PAIR, [2 + L, 1 / 2 - L]),
    (uo.SequenceLogp(), TWO_AND_ONE, [-2 * L, -L]),
    (uo.MeanLogp(), TWO_AND_ONE, [-L, -L]),
    (uo.AlphaReward(1.0), PAIR, [-1, -3]),
]

DISTILLATION = [
    (uo.OPD(), TWICE | {"teacher": [1]}, [-2 * L]),
    (uo.SampledReverseKL(), {"p": [1 / 2], "teacher": [1]}, [L**2]),
    (uo.SDAR(1.0), {"p": [1 / 2], "teacher": [1]}, [2 / 3 * L]),
]

TABLE = [
    *LIKELIHOOD,
    *PENALTIES,
    *POLICY,
    *IMPORTANCE,
    *COMPOSED,
    *CORRECTIONS,
    *TRUST,
    *ADVANTAGES,
    *SEQUENCES,
    *REGRESSIONS,
    *UNPAIRED,
    *GROUPS,
    *BATCH,
    *PREFERENCES,
    *SCORES,
    *DISTILLATION,
]


@pytest.mark.parametrize(("function", "given", "expected"), TABLE, ids=lambda x: repr(x) if callable(x) else "")
def test_values(function: Any, given: dict[str, Any], expected: list[float]) -> None:
    t = tokens(**given)
    got = function(t).double()
    got = got[t.valid] if got.shape == t.valid.shape else got
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_every_one_is_worked_by_hand() -> None:
    classes = {name for name in uo.__all__ if isinstance(x := getattr(uo, name), type) and issubclass(x, Parameters)}
    assert classes - {"Objective"} == {type(function).__name__ for function, *_ in TABLE}
