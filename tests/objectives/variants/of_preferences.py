"""Rows 122 to 168: preferences of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import RAGGED, Answer
from tests.objectives.variants.of_sequences import mean
from tests.objectives.variants.rows import Row, of_pairs, plus, token_sum
from unirl_kernels.objectives import (
    AOT,
    DPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    REBEL,
    SFT,
    XPO,
    AlphaDivergence,
    AlphaReward,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    BetaDPO,
    CalibratedDPO,
    ChiSquared,
    ChosenNLL,
    ConservativeDPO,
    DesensitizedLogRatio,
    DiscoPOP,
    DPOPositive,
    ForwardKL,
    Hinge,
    JensenShannon,
    LengthMean,
    LogRatio,
    OddsRatio,
    OffsetDPO,
    RobustDPO,
    SequenceLogp,
    ShiftedDPO,
    SimPO,
    SPPOHard,
    WeightedLogRatio,
)

PAIRS = uk.PairMean()
B = 0.3
N_CHOSEN = sum(RAGGED[:3])


def R(o: Answer) -> Tensor:
    """Log-ratio of the sequence to the reference."""
    return (o.logp - o.ref_logp).sum()


def log_sigma(x: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(x))


def of_margin(f: Callable[[Tensor], Tensor], score: Callable[[Answer], Tensor] = R) -> object:
    return of_pairs(lambda a, b: f(score(a) - score(b)))


def of_scores(f: Callable[[Tensor, Tensor], Tensor], score: Callable[[Answer], Tensor] = R) -> object:
    return of_pairs(lambda a, b: f(score(a), score(b)))


def dpo(x: Tensor) -> Tensor:
    return -log_sigma(B * x)


def mean_ratio(o: Answer) -> Tensor:
    return mean(o.logp - o.ref_logp)


def exo(x: Tensor) -> Tensor:
    q, e = torch.sigmoid(B * x), 0.1
    return q * torch.log(q / (1 - e)) + (1 - q) * torch.log((1 - q) / e)


def nca(a: Tensor, b: Tensor) -> Tensor:
    return -log_sigma(B * a) - log_sigma(-B * a) / 2 - log_sigma(-B * b) / 2


def bco_pair(a: Tensor, b: Tensor) -> Tensor:
    return -log_sigma(B * a) - log_sigma(-B * b)


def discopop(x: Tensor) -> Tensor:
    gate = torch.sigmoid(B * x / 0.5)
    return (1 - gate) * -log_sigma(B * x) + gate * torch.exp(-B * x)


def alpha_score(o: Answer) -> Tensor:
    return (torch.exp(R(o)) ** (0.5 - 1) - 1) / (0.5 - 1)


def calibrated(a: Tensor, b: Tensor) -> Tensor:
    return -log_sigma(a - b) + (a - 1 / (2 * B)) ** 2 + (b + 1 / (2 * B)) ** 2


def desensitized(a: Answer, b: Answer) -> Tensor:
    shared = min(len(a), len(b))

    def score(o: Answer) -> Tensor:
        d = o.logp - o.ref_logp
        return d[:shared].sum() + 0.5 * d[shared:].sum()

    return dpo(score(a) - score(b))


def aot(answers: list[Answer]) -> Tensor:
    chosen, rejected = answers[:3], answers[3:]
    of_policy = sorted(a.logp.sum() - b.logp.sum() for a, b in zip(chosen, rejected, strict=True))
    of_reference = sorted(a.ref_logp.sum() - b.ref_logp.sum() for a, b in zip(chosen, rejected, strict=True))
    margins = [x - y for x, y in zip(of_policy, of_reference, strict=True)]
    return sum(-0.9 * log_sigma(B * d) - 0.1 * log_sigma(-B * d) for d in margins) / 3


def aot_unpaired(answers: list[Answer]) -> Tensor:
    margins = [x - y for x, y in zip(sorted(map(R, answers[:3])), sorted(map(R, answers[3:])), strict=True)]
    return sum(map(dpo, margins)) / 3


def beta_dpo(answers: list[Answer]) -> Tensor:
    margins = [R(a) - R(b) for a, b in zip(answers[:3], answers[3:], strict=True)]
    beta = B * (1 + 0.6 * (sum(B * d for d in margins).detach() / 3 - 0.1))
    return sum(-log_sigma(beta * d) for d in margins) / 3


def chosen_nll(answers: list[Answer]) -> Tensor:
    """Token mean over all chosen sequences."""
    return token_sum(lambda o: -o.logp * o.chosen)(answers) / sum(len(o) for o in answers[: len(answers) // 2])


def odds(log_p: Tensor) -> Tensor:
    return torch.log(torch.exp(log_p) / (1 - torch.exp(log_p)))


def odds_ratio(a: Answer, b: Answer, answer: bool = False) -> Tensor:
    p, q = (x.logp[x.answer > 0].mean() if answer else x.logp.mean() for x in (a, b))
    return -B * log_sigma(odds(p) - odds(q))


def xpo(a: Answer, b: Answer) -> Tensor:
    flagged = a.from_reference * a.logp.sum() + b.from_reference * b.logp.sum()
    return dpo(R(a) - R(b)) + 0.05 * flagged


def wpo(a: Answer, b: Answer) -> Tensor:
    return a.sample_weight * b.sample_weight * dpo(R(a) - R(b))


REF = "ref_logp"
CHOSEN_NLL = uk.Weighted(uk.TokenMean(N_CHOSEN), "chosen")

ROWS = [
    Row(122, "dpo", lambda: uk.dpo(B), of_margin(dpo), REF),
    Row(123, "sigmoid_norm", lambda: uk.dpo(B, length_normalized=True), of_margin(dpo, mean_ratio), REF),
    Row(124, "hinge", lambda: uk.Loss(Hinge(B), PAIRS), of_margin(lambda x: torch.clamp(1 - B * x, min=0)), REF),
    Row(
        125,
        "ipo, averaged",
        lambda: uk.Loss(IPO(B), PAIRS),
        of_margin(lambda x: (x - 1 / (2 * B)) ** 2, mean_ratio),
        REF,
    ),
    Row(
        126, "ipo, summed", lambda: uk.Loss(IPO(B, LogRatio()), PAIRS), of_margin(lambda x: (x - 1 / (2 * B)) ** 2), REF
    ),
    Row(127, "exo_pair", lambda: uk.Loss(EXO(B, 0.1), PAIRS), of_margin(exo), REF),
    Row(128, "nca_pair", lambda: uk.Loss(NCA(B), PAIRS), of_scores(nca), REF),
    Row(
        129, "cdpo", lambda: uk.Loss(ConservativeDPO(B), PAIRS), of_margin(lambda x: 0.9 * dpo(x) + 0.1 * dpo(-x)), REF
    ),
    Row(
        130,
        "robust",
        lambda: uk.Loss(RobustDPO(B), PAIRS),
        of_margin(lambda x: (0.9 * dpo(x) - 0.1 * dpo(-x)) / 0.8),
        REF,
    ),
    Row(131, "bco_pair", lambda: uk.Loss(BCOPair(B), PAIRS), of_scores(bco_pair), REF),
    Row(
        132,
        "sppo_hard",
        lambda: uk.Loss(SPPOHard(B), PAIRS),
        of_scores(lambda a, b: (a - 0.5 / B) ** 2 + (b + 0.5 / B) ** 2),
        REF,
    ),
    Row(
        133,
        "apo_zero",
        lambda: uk.Loss(APOZero(B), PAIRS),
        of_scores(lambda a, b: 1 - torch.sigmoid(B * a) + torch.sigmoid(B * b)),
        REF,
    ),
    Row(
        134,
        "apo_down",
        lambda: uk.Loss(APODown(B), PAIRS),
        of_scores(lambda a, b: torch.sigmoid(B * a) + 1 - torch.sigmoid(B * (a - b))),
        REF,
    ),
    Row(135, "discopop", lambda: uk.Loss(DiscoPOP(B, 0.5), PAIRS), of_margin(discopop), REF),
    Row(
        136,
        "f-divergence forward_kl",
        lambda: uk.Loss(DPO(B, score=ForwardKL()), PAIRS),
        of_margin(dpo, lambda o: 1 - torch.exp(-R(o))),
        REF,
    ),
    Row(
        136,
        "f-divergence forward_kl, averaged",
        lambda: uk.Loss(DPO(B, score=LengthMean(ForwardKL())), PAIRS),
        of_margin(dpo, lambda o: (1 - torch.exp(-R(o))) / max(len(o), 1)),
        REF,
    ),
    Row(
        137,
        "f-divergence js",
        lambda: uk.Loss(DPO(B, score=JensenShannon()), PAIRS),
        of_margin(dpo, lambda o: math.log(2) + log_sigma(R(o))),
        REF,
    ),
    Row(
        137,
        "f-divergence js, by length",
        lambda: uk.Loss(DPO(B, score=LengthMean(JensenShannon())), PAIRS),
        of_margin(dpo, lambda o: (math.log(2) + log_sigma(R(o))) / max(len(o), 1)),
        REF,
    ),
    Row(
        138,
        "f-divergence alpha",
        lambda: uk.Loss(DPO(B, score=AlphaDivergence(0.5)), PAIRS),
        of_margin(dpo, alpha_score),
        REF,
    ),
    Row(139, "dpo-shift", lambda: uk.Loss(ShiftedDPO(B, 0.7), PAIRS), of_scores(lambda a, b: dpo(a - 0.7 * b)), REF),
    Row(
        140,
        "chi-po",
        lambda: uk.Loss(DPO(B, score=ChiSquared()), PAIRS),
        of_margin(dpo, lambda o: torch.exp(R(o)) + R(o)),
        REF,
    ),
    Row(
        141,
        "mpo",
        lambda: 0.8 * uk.Loss(DPO(B), PAIRS) + 0.2 * uk.Loss(BCOPair(B), PAIRS),
        of_scores(lambda a, b: 0.8 * dpo(a - b) + 0.2 * bco_pair(a, b)),
        REF,
    ),
    Row(142, "calibrated dpo", lambda: uk.Loss(CalibratedDPO(B), PAIRS), of_scores(calibrated), REF),
    Row(
        143,
        "dpo-positive",
        lambda: uk.Loss(DPOPositive(B, 5.0), PAIRS),
        of_scores(lambda a, b: dpo(a - b - 5 * torch.clamp(-a, min=0))),
        "ref_logp:old_logp",
    ),
    Row(
        144,
        "dpo, sums of the reference",
        lambda: uk.Loss(DPO(B, score=LogRatio("ref_sum")), PAIRS),
        of_margin(dpo, lambda o: o.logp.sum() - o.ref_sum),
        "ref_sum",
    ),
    Row(
        145,
        "reward-aware",
        lambda: uk.Loss(OffsetDPO(B, 0.5), PAIRS),
        of_pairs(lambda a, b: -log_sigma(B * (R(a) - R(b)) - 0.5 * (a.reward - b.reward))),
        REF + " reward",
    ),
    Row(
        146,
        "rebel",
        lambda: uk.Loss(REBEL(B), PAIRS),
        of_pairs(lambda a, b: (B * (R(a) - R(b)) - (a.reward - b.reward)) ** 2),
        REF + " reward",
    ),
    Row(147, "ld_alpha", lambda: uk.Loss(DPO(B, score=DesensitizedLogRatio(0.5)), PAIRS), of_pairs(desensitized), REF),
    Row(
        148,
        "token-weighted dpo",
        lambda: uk.Loss(DPO(B, score=WeightedLogRatio()), PAIRS),
        of_margin(dpo, lambda o: (o.token_weight * (o.logp - o.ref_logp)).sum()),
        REF + " token_weight",
    ),
    Row(
        149,
        "dpo + nll / |o| of the chosen",
        lambda: uk.dpo(B) + 0.2 * uk.Loss(ChosenNLL(), PAIRS),
        of_pairs(lambda a, b: dpo(R(a) - R(b)) - 0.2 * mean(a.logp)),
        REF,
    ),
    Row(
        150,
        "dpo + token-mean nll of all chosen",
        lambda: uk.dpo(B) + 0.2 * uk.Loss(SFT(), CHOSEN_NLL),
        plus((1, of_margin(dpo)), (0.2, chosen_nll)),
        REF + " chosen",
    ),
    Row(151, "aot", lambda: uk.Loss(AOT(B, 0.1), PAIRS), aot, REF),
    Row(152, "aot_unpaired", lambda: uk.Loss(AOTUnpaired(B), PAIRS), aot_unpaired, REF),
    Row(153, "beta-dpo", lambda: uk.Loss(BetaDPO(B, 0.6, margin=0.1), PAIRS), beta_dpo, REF),
    Row(
        154,
        "interleaved pairs",
        lambda: uk.dpo(B),
        of_pairs(lambda a, b: dpo(R(a) - R(b)), interleaved=True),
        REF,
        interleaved=True,
    ),
    Row(
        156,
        "simpo",
        lambda: uk.Loss(SimPO(B, 0.2), PAIRS),
        of_margin(lambda x: -log_sigma(B * x - 0.2), lambda o: mean(o.logp)),
    ),
    Row(
        157,
        "alphapo",
        lambda: uk.Loss(SimPO(B, 0.2, AlphaReward(0.25)), PAIRS),
        of_margin(lambda x: -log_sigma(B * x - 0.2), lambda o: (1 - torch.exp(mean(o.logp)) ** -0.25) / 0.25),
    ),
    Row(
        158, "cpo sigmoid", lambda: uk.Loss(DPO(B, score=SequenceLogp()), PAIRS), of_margin(dpo, lambda o: o.logp.sum())
    ),
    Row(
        160,
        "orpo",
        lambda: uk.Loss(ORPO(B), PAIRS),
        of_pairs(lambda a, b: -a.logp.mean() + odds_ratio(a, b)),
        empty=False,
    ),
    Row(
        161,
        "orpo (TRL): nll of prompt and answer",
        lambda: uk.Loss(OddsRatio(B, "answer"), PAIRS) + uk.Loss(SFT(), uk.Weighted(uk.TokenMean(6), "chosen")),
        plus((1, of_pairs(lambda a, b: odds_ratio(a, b, True))), (1, chosen_nll)),
        "answer chosen",
        empty=False,
    ),
    Row(168, "xpo", lambda: uk.Loss(XPO(B, 0.05), PAIRS), of_pairs(xpo), REF + " from_reference"),
    Row(
        198,
        "pairs with weights, count of the global batch",
        lambda: uk.Loss(DPO(B), uk.Weighted(uk.PairMean(5), "sample_weight")),
        lambda answers: 3 / 5 * of_pairs(wpo)(answers),
        REF + " sample_weight",
    ),
]
