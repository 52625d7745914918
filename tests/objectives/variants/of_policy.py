"""Rows 20 to 57: surrogates of the return, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import Answer
from tests.objectives.variants.rows import Row, k3, mean_of_means, mean_of_sums, ppo, r, sg, token_mean, token_sum
from unirl_kernels.objectives import (
    ASPO,
    CISPO,
    DCPO,
    DRPO,
    K2,
    KL,
    OPD,
    SAPO,
    SPO,
    TOPR,
    AdvantageWeighted,
    Choose,
    Clip,
    DualClip,
    EntropyAbove,
    Flag,
    IcePop,
    MaskedCISPO,
    OneSide,
    PolicyGradient,
    Ratio,
    Reinforce,
    Ring,
    Scaled,
    ShapedLikelihood,
    SimplePPO,
    TruncatedRatio,
    TrustBand,
    TrustKL,
    TrustTV,
    TwoSidedClip,
    WithAdvantage,
)

TOKENS = uk.TokenMean()
A = "advantage old_logp"
REF = "advantage old_logp ref_logp"


def reinforce(o: Answer) -> Tensor:
    return -o.advantage * o.logp


def clip(o: Answer) -> Tensor:
    return ppo(r(o), o.advantage)


def dual_clip(o: Answer, c: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    loss = ppo(torch.exp(torch.clamp(o.logp - o.old_logp, -20, 20)), o.advantage, low, high)
    return torch.minimum(loss, -c * o.advantage) if o.advantage < 0 else loss


def two_sided(o: Answer, delta: float) -> Tensor:
    return -torch.minimum(torch.clamp(r(o), max=delta) * o.advantage, torch.clamp(r(o), 0.8, 1.2) * o.advantage)


def cispo(o: Answer, lower: float, upper: float) -> Tensor:
    return -sg(torch.clamp(r(o), lower, upper)) * o.advantage * o.logp


def masked_cispo(o: Answer) -> Tensor:
    kept = r(o) <= 1.2 if o.advantage > 0 else r(o) >= 0.8
    return -sg(r(o)) * o.advantage * o.logp * kept


def rollout_is(o: Answer) -> Tensor:
    w = torch.exp(o.logp - o.rollout_logp)
    return -sg(w * ((w > 0.6) & (w < 1.4))) * o.advantage * o.logp


def topr(o: Answer) -> Tensor:
    return -(1 if o.reward > 0 else sg(torch.clamp(r(o), 0, 1))) * o.advantage * o.logp


def sapo(o: Answer) -> Tensor:
    tau = 1.0 if o.advantage > 0 else 1.05
    return -torch.sigmoid(tau * (r(o) - 1)) * 4 / tau * o.advantage


def sapo_bounded(o: Answer) -> Tensor:
    tau = 1.0 if o.advantage > 0 else 1.05
    ratio = torch.exp(torch.clamp(o.logp - o.old_logp, -20, 20))
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * o.advantage


def inside_tv(o: Answer, low: float, high: float) -> Tensor:
    moved = o.logp.exp() - o.old_logp.exp()
    return moved <= high if o.advantage > 0 else moved >= -low


def dppo_tv(o: Answer) -> Tensor:
    return -o.advantage * sg(torch.clamp(r(o), max=1.5)) * o.logp * inside_tv(o, 0.05, 0.08)


def dppo_tv_by_ratio(o: Answer) -> Tensor:
    return -o.advantage * r(o) * inside_tv(o, 0.05, 0.08)


def dppo_kl(o: Answer) -> Tensor:
    p, q = o.logp.exp(), o.old_logp.exp()
    kl = q * (o.old_logp - o.logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    kept = (kl <= 0.01) | (p <= q) if o.advantage > 0 else (kl <= 0.005) | (p >= q)
    return -o.advantage * sg(torch.clamp(r(o), max=1.5)) * o.logp * kept


def prime_rl(o: Answer) -> Tensor:
    return dppo_tv_by_ratio(o) + 1e-3 * (o.logp - o.old_logp) ** 2


def prime_rl_ipo(o: Answer) -> Tensor:
    return -o.advantage * r(o) * ((o.logp.exp() - o.old_logp.exp()).abs() <= 0.1)


def drpo(o: Answer) -> Tensor:
    return -o.advantage * r(o) + abs(o.advantage) * o.old_logp.exp() * (r(o) - 1) ** 2 / (2 * 12.5)


def spo(o: Answer) -> Tensor:
    return -o.advantage * r(o) + abs(o.advantage) * (r(o) - 1) ** 2 / (2 * 0.3)


def simple_ppo(o: Answer) -> Tensor:
    return -o.advantage * (o.logp - o.old_logp) * ((r(o) >= 1 / 1.3) & (r(o) <= 1.3))


def rec_ring(o: Answer) -> Tensor:
    far = r(o) <= 0.65 if o.advantage >= 0 else r(o) >= 1.5
    kept = ((r(o) >= 0.8) & (r(o) <= 1.2)) | far
    return -o.advantage * torch.exp(o.advantage / 2) * o.logp * kept + 0.1 * (o.logp - o.old_logp) ** 2


def bypass(o: Answer) -> Tensor:
    return -o.advantage * o.logp * sg(torch.clamp(torch.exp(o.logp - o.rollout_logp), max=1.2))


def aspo(o: Answer) -> Tensor:
    if o.advantage <= 0:
        return ppo(r(o), o.advantage)
    flipped = torch.clamp(o.old_logp.exp() / sg(o.logp.exp()), max=1.5) * o.logp.exp() / sg(o.logp.exp())
    return -flipped * o.advantage * (r(o) <= 1.2)


def dcpo(o: Answer) -> Tensor:
    q = o.old_logp.exp()
    low = 0.5 + 0.5 * torch.sqrt(torch.clamp(1 - 4 * 0.05 / q, min=0))
    high = torch.clamp(0.5 + 0.5 * torch.sqrt(1 + 4 * 0.2 / q), max=1.6)
    clipped = torch.where(r(o) < low, low, torch.where(r(o) > high, high, r(o)))
    return -torch.minimum(r(o) * o.advantage, clipped * o.advantage)


def archer(o: Answer) -> Tensor:
    free = ppo(r(o), o.advantage, 0.5, 0.5)
    return torch.where(sg(o.entropy) > 1.2, free, ppo(r(o), o.advantage) + 0.05 * k3(o))


def luffy(o: Answer) -> Tensor:
    if o.expert:
        return -o.advantage * o.logp.exp() / (o.logp.exp() + 0.1)
    return clip(o)


def own_weight(t: object) -> Tensor:
    """As verl's bypass mode writes it."""
    with torch.no_grad():
        w = torch.exp(t.logp - t.rollout_logp).clamp(max=1.2)
    return -t.advantage * t.logp * w


ROWS = [
    Row(20, "reinforce, gpg", lambda: uk.Loss(Reinforce(), TOKENS), token_mean(reinforce), "advantage"),
    Row(21, "on policy", uk.ppo, mean_of_means(lambda o: -o.advantage * r(o)), "advantage"),
    Row(22, "ppo clip", uk.ppo, mean_of_means(clip), A),
    Row(
        23,
        "dapo",
        lambda: uk.Loss(Clip(0.2, 0.28), TOKENS),
        token_mean(lambda o: ppo(r(o), o.advantage, 0.2, 0.28)),
        A,
    ),
    Row(24, "dr. grpo", lambda: uk.Loss(Clip(), uk.FixedLength(8)), mean_of_sums(clip, 8), A),
    Row(25, "bnpo", lambda: uk.Loss(Clip(), TOKENS), token_mean(clip), A),
    Row(26, "grpo", uk.grpo, mean_of_means(lambda o: clip(o) + 0.04 * k3(o)), REF),
    Row(
        27,
        "verl vanilla",
        lambda: uk.Loss(DualClip(0.2, 0.3, c=3.0), TOKENS),
        token_mean(lambda o: dual_clip(o, 3.0, 0.2, 0.3)),
        A,
    ),
    Row(
        28, "dual clip that bites", lambda: uk.Loss(DualClip(c=1.1), TOKENS), token_mean(lambda o: dual_clip(o, 1.1)), A
    ),
    Row(
        29,
        "two-sided delta",
        lambda: uk.Loss(TwoSidedClip(delta=1.4), TOKENS),
        token_mean(lambda o: two_sided(o, 1.4)),
        A,
    ),
    Row(30, "cispo, one side", lambda: uk.Loss(CISPO(0, 1.5), TOKENS), token_mean(lambda o: cispo(o, 0, 1.5)), A),
    Row(
        31,
        "cispo, two sides",
        lambda: uk.Loss(CISPO(0.8, 1.2), TOKENS),
        token_mean(lambda o: cispo(o, 0.8, 1.2)),
        A,
    ),
    Row(32, "cispo, unified mask", lambda: uk.Loss(MaskedCISPO(), TOKENS), token_mean(masked_cispo), A),
    Row(
        33,
        "rollout_is",
        lambda: uk.Loss(Scaled(Reinforce(), IcePop("logp", low=0.6, high=1.4)), TOKENS),
        token_mean(rollout_is),
        "advantage rollout_logp",
    ),
    Row(34, "clamped reinforce", lambda: uk.Loss(CISPO(0.1, 10), TOKENS), token_mean(lambda o: cispo(o, 0.1, 10)), A),
    Row(
        35,
        "importance sampling, sum",
        lambda: uk.Loss(Ratio(), uk.TokenMean(1)),
        token_sum(lambda o: -o.advantage * r(o)),
        A,
    ),
    Row(36, "tis-pg", lambda: uk.Loss(CISPO(0, 1), TOKENS), token_mean(lambda o: cispo(o, 0, 1)), A),
    Row(37, "topr", lambda: uk.Loss(TOPR(), TOKENS), token_mean(topr), A + " reward"),
    Row(
        38,
        "kimi-1.5",
        lambda: uk.Loss(Reinforce(), TOKENS) + 0.3 * uk.Loss(K2("old_logp"), TOKENS),
        token_mean(lambda o: reinforce(o) + 0.3 / 2 * (o.logp - o.old_logp) ** 2),
        A,
    ),
    Row(
        39,
        "dro",
        lambda: uk.Loss(Reinforce()) + 0.05 * uk.Loss(K2("old_logp")),
        mean_of_means(lambda o: -(o.advantage * o.logp - 0.05 / 2 * (o.logp - o.old_logp) ** 2)),
        A,
    ),
    Row(
        40,
        "opmd",
        lambda: 1 / 1.5 * uk.Loss(Reinforce(), TOKENS),
        token_mean(lambda o: reinforce(o) / (1 + 0.5)),
        "advantage",
    ),
    Row(41, "sapo", lambda: uk.Loss(SAPO()), mean_of_means(sapo), A),
    Row(42, "sapo, log-ratio bounded", lambda: uk.Loss(SAPO()), mean_of_means(sapo_bounded), A),
    Row(
        43,
        "dppo_tv",
        lambda: uk.Loss(Scaled(CISPO(0, 1.5), TrustTV(0.05, 0.08)), TOKENS),
        token_mean(dppo_tv),
        A,
    ),
    Row(
        44,
        "dppo_kl",
        lambda: uk.Loss(Scaled(CISPO(0, 1.5), TrustKL(0.005, 0.01)), TOKENS),
        token_mean(dppo_kl),
        A,
    ),
    Row(
        45,
        "dppo tv through the ratio",
        lambda: uk.Loss(Scaled(Ratio(), TrustTV(0.05, 0.08)), TOKENS),
        token_mean(dppo_tv_by_ratio),
        A,
    ),
    Row(
        46,
        "prime-rl default",
        lambda: uk.Loss(Scaled(Ratio(), TrustTV(0.05, 0.08)), TOKENS) + 2e-3 * uk.Loss(K2("old_logp"), TOKENS),
        token_mean(prime_rl),
        A,
    ),
    Row(47, "prime-rl ipo", lambda: uk.Loss(Scaled(Ratio(), TrustBand(0.1)), TOKENS), token_mean(prime_rl_ipo), A),
    Row(
        48,
        "prime-rl ref_kl",
        lambda: uk.Loss(OPD(), TOKENS),
        token_mean(lambda o: -r(o) * sg(o.teacher_logp - o.logp)),
        "old_logp teacher_logp:ref_logp",
    ),
    Row(49, "drpo", lambda: uk.Loss(DRPO(), TOKENS), token_mean(drpo), A),
    Row(50, "spo", lambda: uk.Loss(SPO(0.3), TOKENS), token_mean(spo), A),
    Row(51, "sppo", lambda: uk.Loss(SimplePPO(), TOKENS), token_mean(simple_ppo), A),
    Row(
        52,
        "rec ring",
        lambda: (
            uk.Loss(WithAdvantage(Scaled(Reinforce(), Ring(0.2, 0.2, 0.35, 0.5)), AdvantageWeighted(2.0)), TOKENS)
            + 0.2 * uk.Loss(K2("old_logp"), TOKENS)
        ),
        token_mean(rec_ring),
        A,
    ),
    Row(
        52,
        "rec one-side",
        lambda: uk.Loss(Scaled(Ratio(), OneSide(0.1, 0.3)), TOKENS),
        token_mean(lambda o: -o.advantage * r(o) * (r(o) <= 1.3 if o.advantage >= 0 else r(o) >= 0.9)),
        A,
    ),
    Row(
        53, "a weight under no_grad", lambda: uk.Loss(own_weight, TOKENS), token_mean(bypass), "advantage rollout_logp"
    ),
    Row(54, "aspo", lambda: uk.Loss(ASPO(c=1.5), TOKENS), token_mean(aspo), A),
    Row(55, "dcpo", lambda: uk.Loss(DCPO(0.05, 0.2, 1.6), TOKENS), token_mean(dcpo), A),
    Row(
        56,
        "archer",
        lambda: uk.Loss(
            Choose(EntropyAbove(1.2), Clip(0.5, 0.5), PolicyGradient(Clip(), KL(0.05))),
            TOKENS,
        ),
        token_mean(archer),
        REF,
    ),
    Row(
        57,
        "luffy",
        lambda: uk.Loss(Choose(Flag("expert"), ShapedLikelihood(), Clip()), TOKENS),
        token_mean(luffy),
        A + " expert",
    ),
    Row(
        72,
        "bypass_mode reinforce",
        lambda: uk.Loss(Scaled(Reinforce(), TruncatedRatio("logp", high=1.2)), TOKENS),
        token_mean(bypass),
        "advantage rollout_logp",
    ),
]
