"""Rows 58 to 90: sums, entropy, corrections for the sampler, estimates of the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import Answer
from tests.objectives.variants.of_policy import clip, reinforce
from tests.objectives.variants.rows import Row, k3, mean_of_means, plus, ppo, r, sg, token_mean, token_sum
from unirl_kernels.objectives import (
    K1,
    K2,
    K3,
    OPD,
    SDAR,
    SFT,
    AbsoluteKL,
    BatchNormalized,
    Clip,
    Entropy,
    EntropyAbove,
    EntropyShaped,
    EntropyTarget,
    IcePop,
    ImportanceWeighted,
    LowVarianceKL,
    PolicyGradient,
    Ratio,
    Reinforce,
    Scaled,
    SequenceIcePop,
    SequenceMask,
    SequenceTruncatedRatio,
    StraightThrough,
    TruncatedRatio,
    WithAdvantage,
)

TOKENS = uk.TokenMean()
A = "advantage old_logp"
REF = "advantage old_logp ref_logp"


def entropy(o: Answer) -> Tensor:
    return o.entropy


def shaped(o: Answer) -> Tensor:
    bonus = torch.clamp(0.4 * sg(o.entropy), max=float(abs(o.advantage)) / 2)
    return ppo(r(o), o.advantage + bonus)


def masked_80_20(o: Answer) -> Tensor:
    return (ppo(r(o), o.advantage) + 0.04 * k3(o)) * (sg(o.entropy) > 1.2)


def rollout(o: Answer) -> Tensor:
    return torch.exp(o.old_logp - o.rollout_logp)


def ice(o: Answer) -> Tensor:
    return rollout(o) * ((rollout(o) >= 0.7) & (rollout(o) <= 1.5))


def bounded_k3(d: Tensor, most: float) -> Tensor:
    return torch.clamp(torch.exp(d) - d - 1, -most, most)


def low_variance(o: Answer, other: str = "ref_logp") -> Tensor:
    return bounded_k3(torch.clamp(getattr(o, other) - o.logp, -20, 20), 10)


def k2(o: Answer) -> Tensor:
    return (o.logp - o.ref_logp) ** 2 / 2


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    return gradient - sg(gradient) + sg(value)


def by_sequence(o: Answer) -> Tensor:
    w = torch.clamp(torch.exp((o.logp - o.rollout_logp).sum()), max=1.5)
    return reinforce(o) * sg(w)


def rejected_by_sequence(o: Answer) -> Tensor:
    mean = (o.logp - o.rollout_logp).mean() if len(o) else 0.0
    return reinforce(o) * (-0.25 <= mean <= 0.25)


def masked_by_sequence(o: Answer) -> Tensor:
    w = torch.exp((o.old_logp - o.rollout_logp).sum())
    return w * (0.6 <= w <= 1.5)


def normalized(answers: list[Answer]) -> Tensor:
    w = [sg(torch.clamp(torch.exp(o.logp - o.rollout_logp), max=2)) for o in answers]
    mean = torch.cat(w).mean()
    n = sum(len(o) for o in answers)
    return sum((reinforce(o) * x / mean).sum() for o, x in zip(answers, w, strict=True)) / n


ROWS = [
    Row(
        58,
        "entropy bonus",
        lambda: uk.grpo() - 0.01 * uk.Loss(Entropy()),
        mean_of_means(lambda o: clip(o) + 0.04 * k3(o) - 0.01 * o.entropy),
        REF,
    ),
    Row(
        59,
        "entropy towards a target",
        lambda: uk.Loss(Clip(), TOKENS) + 0.1 * uk.Loss(EntropyTarget(2.0), TOKENS),
        token_mean(lambda o: clip(o) + 0.1 * (o.entropy - 2) ** 2),
        A,
    ),
    Row(
        60,
        "entropy-shaped advantage",
        lambda: uk.Loss(WithAdvantage(Clip(), EntropyShaped()), TOKENS),
        token_mean(shaped),
        A,
    ),
    Row(
        61,
        "80/20 with a threshold",
        lambda: uk.Loss(Scaled(PolicyGradient(), EntropyAbove(1.2)), TOKENS),
        token_mean(masked_80_20),
        REF,
    ),
    Row(
        62,
        "entropy bonus per token, policy per sequence",
        lambda: uk.ppo() - 0.02 * uk.Loss(Entropy(), TOKENS),
        plus((1, mean_of_means(clip)), (-0.02, token_mean(entropy))),
        A,
    ),
    Row(
        63,
        "the same with a KL term",
        lambda: uk.grpo() - 0.02 * uk.Loss(Entropy(), TOKENS),
        plus((1, mean_of_means(lambda o: clip(o) + 0.04 * k3(o))), (-0.02, token_mean(entropy))),
        REF,
    ),
    Row(
        64,
        "vapo: nll of positive samples",
        lambda: uk.Loss(Clip(), TOKENS) + 0.1 * uk.Loss(SFT(), uk.Weighted(uk.TokenMean(5), "positive")),
        plus((1, token_mean(clip)), (0.1, lambda answers: token_sum(lambda o: -o.logp * o.positive)(answers) / 5)),
        A + " positive:verdict",
    ),
    Row(
        65,
        "prime-rl: three streams, three counts",
        lambda: (
            uk.Loss(Ratio(), uk.Weighted(uk.TokenMean(7), "rl_weight"))
            + uk.Loss(SFT(), uk.Weighted(uk.TokenMean(torch.tensor(3)), "ce_weight"))
            + 0.5 * uk.Loss(OPD(), uk.Weighted(uk.TokenMean(6.0), "opd_weight"))
        ),
        lambda answers: token_sum(
            lambda o: (
                -o.rl_weight * o.advantage * r(o) / 7
                - o.ce_weight * o.logp / 3
                - 0.5 / 6 * o.opd_weight * r(o) * sg(o.teacher_logp - o.logp)
            )
        )(answers),
        A + " teacher_logp rl_weight ce_weight opd_weight",
    ),
    Row(
        66,
        "gpg bias correction",
        lambda: torch.tensor(1.25) * uk.Loss(Reinforce(), TOKENS),
        token_mean(lambda o: 1.25 * reinforce(o)),
        "advantage",
    ),
    Row(
        67,
        "reinforce++",
        lambda: uk.Loss(Clip(), TOKENS) + 0.01 * uk.Loss(K2(), TOKENS),
        token_mean(lambda o: clip(o) + 0.01 * k2(o)),
        REF,
    ),
    Row(
        68,
        "truncated IS before KL",
        lambda: uk.Loss(Scaled(Clip(), TruncatedRatio(high=1.3))) + 0.04 * uk.Loss(K3()),
        mean_of_means(lambda o: torch.clamp(rollout(o), max=1.3) * clip(o) + 0.04 * k3(o)),
        REF + " rollout_logp",
    ),
    Row(
        68,
        "sequence mask before KL (TRL)",
        lambda: uk.Loss(Scaled(Clip(), SequenceIcePop(low=0.6, high=1.5))) + 0.04 * uk.Loss(K3()),
        mean_of_means(lambda o: masked_by_sequence(o) * clip(o) + 0.04 * k3(o)),
        REF + " rollout_logp",
    ),
    Row(
        69,
        "icepop before KL",
        lambda: uk.Loss(Scaled(Clip(), IcePop(low=0.7, high=1.5))) + 0.04 * uk.Loss(K3()),
        mean_of_means(lambda o: ice(o) * clip(o) + 0.04 * k3(o)),
        REF + " rollout_logp",
    ),
    Row(
        70,
        "truncated IS on KL too",
        lambda: uk.Loss(Scaled(PolicyGradient(), TruncatedRatio(high=1.3))),
        mean_of_means(lambda o: torch.clamp(rollout(o), max=1.3) * (clip(o) + 0.04 * k3(o))),
        REF + " rollout_logp",
    ),
    Row(
        70,
        "sample weights",
        lambda: uk.Loss(PolicyGradient(), uk.Weighted(uk.SequenceMean(), "sample_weight")),
        mean_of_means(lambda o: o.sample_weight * (clip(o) + 0.04 * k3(o))),
        REF + " sample_weight",
    ),
    Row(
        71,
        "decoupled PPO",
        lambda: uk.Loss(Scaled(Clip(), IcePop(low=0.0, high=1.5)), TOKENS),
        token_mean(lambda o: rollout(o) * (rollout(o) <= 1.5) * clip(o)),
        A + " rollout_logp",
    ),
    Row(
        73,
        "bypass_mode, sequence weight",
        lambda: uk.Loss(Scaled(Reinforce(), SequenceTruncatedRatio("logp", high=1.5))),
        mean_of_means(by_sequence),
        "advantage rollout_logp",
    ),
    Row(
        74,
        "bypass_mode, sequence rejection",
        lambda: uk.Loss(Scaled(Reinforce(), SequenceMask("logp", low=-0.25, high=0.25)), TOKENS),
        token_mean(rejected_by_sequence),
        "advantage rollout_logp",
    ),
    Row(
        75,
        "rollout_is_batch_normalize",
        lambda: uk.Loss(Scaled(Reinforce(), BatchNormalized(TruncatedRatio("logp"))), TOKENS),
        normalized,
        "advantage rollout_logp",
    ),
    Row(
        76,
        "NeMo on-policy KL",
        lambda: uk.Loss(Clip(), TOKENS) + 0.1 * uk.Loss(ImportanceWeighted(K3(), "rollout_logp"), TOKENS),
        token_mean(lambda o: clip(o) + 0.1 * torch.exp(o.logp - o.rollout_logp) * k3(o)),
        REF + " rollout_logp",
    ),
    Row(
        77,
        "NeMo entropy estimate",
        lambda: uk.Loss(Clip(), TOKENS) - 0.1 * uk.Loss(ImportanceWeighted(SFT(), "rollout_logp"), TOKENS),
        token_mean(lambda o: clip(o) + 0.1 * torch.exp(o.logp - o.rollout_logp) * o.logp),
        A + " rollout_logp",
    ),
    Row(
        78,
        "kdrl",
        lambda: uk.ppo() + 0.1 * uk.Loss(K1("teacher_logp")),
        mean_of_means(lambda o: clip(o) + 0.1 * (o.logp - o.teacher_logp)),
        A + " teacher_logp",
    ),
    Row(
        79,
        "kdrl with a KL to the reference",
        lambda: uk.grpo() + 0.1 * uk.Loss(K1("teacher_logp")),
        mean_of_means(lambda o: clip(o) + 0.04 * k3(o) + 0.1 * (o.logp - o.teacher_logp)),
        REF + " teacher_logp",
    ),
    Row(
        80,
        "sdar gate",
        lambda: uk.ppo() + 0.2 * uk.Loss(SDAR(5.0), TOKENS),
        plus(
            (1, mean_of_means(clip)),
            (0.2, token_mean(lambda o: sg(torch.sigmoid(5 * (o.teacher_logp - o.logp))) * (o.teacher_logp - o.logp))),
        ),
        A + " teacher_logp",
    ),
    Row(82, "k1", lambda: uk.Loss(K1(), TOKENS), token_mean(lambda o: o.logp - o.ref_logp), "ref_logp"),
    Row(
        83, "abs", lambda: uk.Loss(AbsoluteKL(), TOKENS), token_mean(lambda o: (o.logp - o.ref_logp).abs()), "ref_logp"
    ),
    Row(84, "k2", lambda: uk.Loss(K2(), TOKENS), token_mean(k2), "ref_logp"),
    Row(85, "k3", lambda: uk.Loss(K3(), TOKENS), token_mean(k3), "ref_logp"),
    Row(86, "low_var_kl", lambda: uk.Loss(LowVarianceKL(), TOKENS), token_mean(low_variance), "ref_logp"),
    Row(
        86,
        "low_var_kl, bounds that bite",
        lambda: uk.Loss(LowVarianceKL(bound=0.5, most=0.1), TOKENS),
        token_mean(lambda o: bounded_k3(torch.clamp(o.ref_logp - o.logp, -0.5, 0.5), 0.1)),
        "ref_logp",
    ),
    Row(
        87,
        "k1+",
        lambda: uk.Loss(StraightThrough(K1()), TOKENS),
        token_mean(lambda o: straight_through(o.logp - o.ref_logp, k2(o))),
        "ref_logp",
    ),
    Row(
        87,
        "k3+",
        lambda: uk.Loss(StraightThrough(LowVarianceKL()), TOKENS),
        token_mean(lambda o: straight_through(low_variance(o), k2(o))),
        "ref_logp",
    ),
    Row(
        88,
        "bias-corrected r k3",
        lambda: uk.Loss(ImportanceWeighted(K3()), TOKENS),
        token_mean(lambda o: r(o) * k3(o)),
        "old_logp ref_logp",
    ),
    Row(
        89,
        "score function",
        lambda: uk.Loss(ImportanceWeighted(K3(), "logp"), TOKENS),
        token_mean(lambda o: torch.exp(o.logp - sg(o.logp)) * k3(o)),
        "ref_logp",
    ),
    Row(
        90,
        "ratio k1",
        lambda: uk.Loss(ImportanceWeighted(K1()), TOKENS),
        token_mean(lambda o: r(o) * (o.logp - o.ref_logp)),
        "old_logp ref_logp",
    ),
]
