"""Rows 92 to 121: ratios of sequences, positions in a sequence, groups, the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import Answer
from tests.objectives.variants.of_policy import clip
from tests.objectives.variants.rows import (
    Row,
    k3,
    mean_of_means,
    mean_of_sums,
    of_groups,
    of_pairs,
    of_sequences,
    ppo,
    r,
    sg,
    token_mean,
)
from unirl_kernels.objectives import (
    A2PO,
    GMPO,
    GSPO,
    K2,
    K3,
    NPO,
    REAL,
    RLOO,
    SFT,
    VESPO,
    ClipCov,
    FlowRL,
    FutureKL,
    GSPOToken,
    InfoNCA,
    KLCov,
    OffPolicyMask,
    PolicyGradient,
    PrefixWeighted,
    Ratio,
    Reinforce,
    Scaled,
    SecondMoment,
    SequenceCISPO,
    SequenceImportanceWeighted,
    SequenceMeanAdvantage,
    SequenceOneSide,
    SequenceSAPO,
    SequenceTwoSidedClip,
    SimPER,
    TargetPolicy,
    TopEntropy,
    TopExcess,
    TrajectoryBalance,
    TwoSidedClip,
    WithAdvantage,
)

TOKENS = uk.TokenMean()
A = "advantage old_logp"
REF = "advantage old_logp ref_logp"


def mean(x: Tensor) -> Tensor:
    """0 of nothing."""
    return x.sum() / max(len(x), 1)


def s(o: Answer) -> Tensor:
    """Geometric mean of the ratios."""
    return torch.exp(mean(o.logp - o.old_logp))


def gspo(o: Answer, low: float = 0.05, high: float = 0.06) -> Tensor:
    return ppo(s(o), o.advantage, low, high)


def gspo_two_sided(o: Answer) -> Tensor:
    bounded = torch.clamp(s(o), max=1.02)
    return -torch.minimum(bounded * o.advantage, torch.clamp(s(o), 0.95, 1.06) * o.advantage)


def gspo_delta(o: Answer) -> Tensor:
    return -torch.minimum(torch.clamp(s(o), max=1.2) * o.advantage, torch.clamp(s(o), 0.95, 1.06) * o.advantage)


def cispo(o: Answer) -> Tensor:
    return -sg(torch.clamp(s(o), max=1.02)) * o.advantage * o.logp


def gspo_with_kl(o: Answer) -> Tensor:
    return gspo(o) + 0.04 * s(o) * k3(o)


def gspo_of_mean_advantage(o: Answer) -> Tensor:
    return ppo(s(o), mean(o.advantage), 0.05, 0.06) * torch.ones_like(o.logp)


def gspo_token(o: Answer) -> Tensor:
    log_s = torch.clamp(sg(mean(o.logp - o.old_logp)) + o.logp - sg(o.logp), -0.1, 0.1)
    return ppo(torch.exp(log_s), o.advantage, 0.05, 0.06)


def sapo(o: Answer) -> Tensor:
    tau = 1.0 if o.advantage > 0 else 1.05
    return -torch.sigmoid(tau * (s(o) - 1)) * 4 / tau * o.advantage


def rloo(o: Answer) -> Tensor:
    return ppo(torch.exp((o.logp - o.old_logp).sum()), o.advantage)


def gmpo(o: Answer) -> Tensor:
    d = o.logp - o.old_logp
    d = torch.clamp(d, max=0.2) if o.advantage > 0 else torch.clamp(d, min=-0.3)
    return -torch.exp(mean(d)) * o.advantage


def vespo(o: Answer, extra: bool = False) -> Tensor:
    log_w = (o.logp - o.old_logp).sum() + (torch.log(o.rollout_weight).sum() if extra else 0)
    w = sg(torch.exp(log_w))
    k, lam = (2.0, 3.0) if o.advantage >= 0 else (3.0, 2.0)
    return -math.exp(lam) * w**k * torch.exp(-lam * w) * o.advantage * o.logp


def opsm(o: Answer) -> Tensor:
    kept = o.advantage >= 0 or mean(o.rollout_logp - o.logp) <= 0.3
    return clip(o) * float(kept)


def a2po(o: Answer) -> Tensor:
    return (0.5 * (o.logp - o.ref_logp).sum() - (o.reward - o.value)) ** 2


def rec_one_side(o: Answer) -> Tensor:
    kept = s(o) <= 1.05 if o.advantage >= 0 else s(o) >= 0.95
    return -o.advantage * o.logp * kept + 0.1 * (o.logp - o.old_logp) ** 2


def fipo(o: Answer) -> Tensor:
    d = sg(o.logp - o.old_logp)
    counted = torch.where(d.exp() > 1.6, 0.0, d)
    weights = []
    for t in range(len(o)):
        future = sum(0.9 ** (k - t) * counted[k] for k in range(t, len(o)))
        w = torch.clamp(torch.exp(future), 0.7, 1.1)
        if o.advantage < 0 and d[t].exp() > 1.3:
            w = torch.clamp(w, 0.8, 1.0)
        weights.append(w)
    loss = -torch.minimum(torch.clamp(r(o), max=1.4) * o.advantage, torch.clamp(r(o), 0.8, 1.2) * o.advantage)
    return loss * torch.stack(weights) if weights else loss


def iw_opd(o: Answer) -> Tensor:
    a = sg(o.teacher_logp - o.logp)
    share = torch.stack([a[:t].abs().sum() / a.abs().sum() for t in range(len(o))]) if len(o) else a
    return -o.logp * a * (1 + 0.5 * (1 - share))


def score(o: Answer) -> Tensor:
    return mean(o.logp - o.old_logp)


def real(group: list[Answer]) -> Tensor:
    good, bad = [o for o in group if o.advantage > 0], [o for o in group if o.advantage <= 0]
    if not good or not bad:
        return torch.zeros(())
    lost = 1 + sum(torch.exp(score(o) / 0.5) for o in bad)
    missed = 1 + sum(torch.exp(-score(o) / 0.5) for o in good)
    return torch.log(lost) + torch.log(missed)


def target_policy(group: list[Answer]) -> Tensor:
    old = torch.stack([o.old_logp.sum() + o.advantage / 0.7 for o in group])
    q = torch.exp(old) / torch.exp(old).sum()
    return -(sg(q) * torch.log_softmax(torch.stack([o.logp.sum() for o in group]), 0)).sum()


def trajectory_balance(group: list[Answer]) -> Tensor:
    """Per group: the sum over its sequences."""
    d = torch.stack([(o.logp - o.ref_logp).sum() - o.reward / 0.5 for o in group])
    log_z = -sg(d.mean())
    return sum((x + log_z) ** 2 for x, o in zip(d, group, strict=True) if len(o))


def mean_over_sequences(f: object) -> object:
    def value(answers: list[Answer]) -> Tensor:
        names = sorted({int(o.group) for o in answers})
        return sum(f([o for o in answers if o.group == name]) for name in names) / len(answers)

    return value


def flowrl(o: Answer) -> Tensor:
    return (o.log_z + mean(o.logp - o.ref_logp) - 2 * o.reward) ** 2


def npo(o: Answer) -> Tensor:
    return 2 / 0.2 * torch.log(1 + torch.exp(0.2 * (o.logp - o.ref_logp).sum()))


def infonca(group: list[Answer]) -> Tensor:
    q = torch.softmax(torch.stack([o.reward / 0.8 for o in group]), 0)
    return -(q * torch.log_softmax(0.3 * torch.stack([(o.logp - o.ref_logp).sum() for o in group]), 0)).sum()


def all_tokens(answers: list[Answer], f: object) -> Tensor:
    return torch.cat([f(o) for o in answers])


def ones(o: Answer) -> Tensor:
    return torch.ones_like(o.logp)


def top_entropy(answers: list[Answer]) -> Tensor:
    h = sg(all_tokens(answers, lambda o: o.entropy))
    kept = h >= torch.quantile(h, 0.65)
    return (all_tokens(answers, clip) * kept).sum() / len(h)


def covariance(answers: list[Answer]) -> Tensor:
    a, logp = all_tokens(answers, lambda o: o.advantage * ones(o)), sg(all_tokens(answers, lambda o: o.logp))
    return (a - a.mean()) * (logp - logp.mean())


def clip_cov(answers: list[Answer]) -> Tensor:
    cov, ratio, a = covariance(answers), all_tokens(answers, r), all_tokens(answers, lambda o: o.advantage * ones(o))
    clipped = -torch.clamp(ratio, 0.8, 1.35) * a > -ratio * a
    left_out = (cov > 0.5) & (cov < 1.5) & ~clipped
    return (torch.where(clipped, -torch.clamp(ratio, 0.8, 1.35) * a, -ratio * a) * ~left_out).mean()


def kl_cov(answers: list[Answer]) -> Tensor:
    chosen = torch.zeros(sum(map(len, answers)), dtype=torch.bool)
    chosen[torch.topk(covariance(answers), int(len(chosen) * 0.3)).indices] = True
    d = all_tokens(answers, lambda o: (o.logp - o.old_logp).abs())
    return (all_tokens(answers, lambda o: -r(o) * o.advantage) + 0.5 * d * chosen).mean()


def m2po(answers: list[Answer]) -> Tensor:
    d, a = all_tokens(answers, lambda o: sg(o.logp - o.old_logp)), all_tokens(answers, lambda o: o.advantage * ones(o))
    kept = torch.ones_like(d, dtype=torch.bool)
    counted = [i for i in range(len(d)) if (a[i] > 0 and d[i] > 0) or (a[i] < 0 and d[i] < 0)]
    while counted and sum(d[i] ** 2 for i in counted) / len(counted) > 0.05:
        largest = max(counted, key=lambda i: d[i] ** 2)
        counted.remove(largest)
        kept[largest] = False
    return (all_tokens(answers, lambda o: -r(o) * o.advantage) * kept).mean()


def rho_1(answers: list[Answer]) -> Tensor:
    excess, loss = all_tokens(answers, lambda o: sg(o.ref_logp - o.logp)), all_tokens(answers, lambda o: -o.logp)
    n = len(excess) // 2
    return loss[torch.topk(excess, n).indices].sum() / n


ROWS = [
    Row(92, "gspo", lambda: uk.Loss(GSPO(0.05, 0.06)), of_sequences(gspo), A),
    Row(
        92,
        "gspo, two-sided",
        lambda: uk.Loss(SequenceTwoSidedClip(0.05, 0.06, 1.02)),
        of_sequences(gspo_two_sided),
        A,
    ),
    Row(
        92,
        "gspo, two-sided delta (TRL)",
        lambda: uk.Loss(SequenceTwoSidedClip(0.05, 0.06, delta=1.2)),
        mean_of_means(gspo_delta),
        "advantage:token_advantage old_logp",
    ),
    Row(
        92,
        "cispo of sequences (TRL)",
        lambda: uk.Loss(SequenceCISPO(0.9, 1.1), TOKENS),
        token_mean(lambda o: -sg(torch.clamp(s(o), 0.9, 1.1)) * o.advantage * o.logp),
        A,
    ),
    Row(92, "cispo, sequence level", lambda: uk.Loss(SequenceCISPO(0.0, 1.02), TOKENS), token_mean(cispo), A),
    Row(
        93,
        "gspo + KL r k3",
        lambda: uk.Loss(GSPO(0.05, 0.06)) + 0.04 * uk.Loss(SequenceImportanceWeighted(K3())),
        mean_of_means(gspo_with_kl),
        REF,
    ),
    Row(
        94,
        "gspo of the mean advantage, token mean",
        lambda: uk.Loss(WithAdvantage(GSPO(0.05, 0.06), SequenceMeanAdvantage()), TOKENS),
        token_mean(gspo_of_mean_advantage),
        "advantage:token_advantage old_logp",
    ),
    Row(
        95,
        "gspo-token",
        lambda: uk.Loss(GSPOToken(0.05, 0.06, bound=0.1)),
        mean_of_means(gspo_token),
        "advantage:token_advantage old_logp",
    ),
    Row(96, "sapo, sequence level", lambda: uk.Loss(SequenceSAPO()), of_sequences(sapo), A),
    Row(97, "rloo", lambda: uk.Loss(RLOO()), of_sequences(rloo), A),
    Row(98, "gmpo", lambda: uk.Loss(GMPO(0.3, 0.2)), of_sequences(gmpo), A),
    Row(99, "vespo", lambda: uk.Loss(VESPO(), TOKENS), token_mean(vespo), A),
    Row(
        100,
        "vespo with the sampler's ratio",
        lambda: uk.Loss(VESPO(rollout_weight="rollout_weight"), TOKENS),
        token_mean(lambda o: vespo(o, True)),
        A + " rollout_weight",
    ),
    Row(
        101,
        "luspo, sequence level",
        lambda: uk.Loss(GSPO(0.05, 0.06), uk.FixedLength(1)),
        mean_of_sums(lambda o: gspo(o) * ones(o)),
        A,
    ),
    Row(102, "luspo, token level", lambda: uk.Loss(PolicyGradient(kl=None), uk.FixedLength(1)), mean_of_sums(clip), A),
    Row(
        103,
        "opsm",
        lambda: uk.Loss(Scaled(PolicyGradient(kl=None), OffPolicyMask(0.3))),
        mean_of_means(opsm),
        A + " rollout_logp",
    ),
    Row(104, "a2po", lambda: uk.Loss(A2PO(0.5)), of_sequences(a2po), "ref_logp reward value"),
    Row(
        105,
        "a2po, rewards per sequence",
        lambda: uk.Loss(A2PO(0.5), uk.SequenceMean(empty="skip")),
        lambda answers: sum(a2po(o) for o in answers if len(o)) / sum(len(o) > 0 for o in answers),
        "ref_logp reward value",
    ),
    Row(
        106,
        "rec gspo-one-side",
        lambda: uk.Loss(Scaled(Reinforce(), SequenceOneSide(0.05, 0.05))) + 0.2 * uk.Loss(K2("old_logp")),
        mean_of_means(rec_one_side),
        A,
    ),
    Row(
        107,
        "fipo",
        lambda: uk.Loss(Scaled(TwoSidedClip(delta=1.4), FutureKL(0.9, 0.7, 1.1, delta=1.6, safe=1.3)), TOKENS),
        token_mean(fipo),
        A,
    ),
    Row(
        108,
        "iw-opd",
        lambda: uk.Loss(WithAdvantage(Reinforce(), PrefixWeighted(0.5)), TOKENS),
        token_mean(iw_opd),
        "teacher_logp",
    ),
    Row(109, "real", lambda: uk.Loss(REAL(), uk.GroupMean()), of_groups(real), A + " group"),
    Row(
        110,
        "target policy optimisation",
        lambda: uk.Loss(TargetPolicy(0.7), uk.GroupMean()),
        of_groups(target_policy),
        A + " group",
    ),
    Row(
        111,
        "trajectory balance",
        lambda: uk.Loss(TrajectoryBalance(0.5)),
        mean_over_sequences(trajectory_balance),
        "ref_logp reward group",
    ),
    Row(112, "flowrl", lambda: uk.Loss(FlowRL(2.0)), of_sequences(flowrl), "ref_logp reward log_z"),
    Row(113, "npo", lambda: uk.Loss(NPO(0.2)), of_sequences(npo), "ref_logp"),
    Row(
        114,
        "simper",
        lambda: uk.Loss(SimPER(), uk.PairMean()),
        of_pairs(lambda a, b: torch.exp(mean(b.logp)) - torch.exp(mean(a.logp))),
    ),
    Row(
        115, "infonca", lambda: uk.Loss(InfoNCA(0.3, 0.8), uk.GroupMean()), of_groups(infonca), "ref_logp reward group"
    ),
    Row(
        116,
        "top_entropy_quantile",
        lambda: uk.Loss(Scaled(PolicyGradient(kl=None), TopEntropy(0.35)), TOKENS),
        top_entropy,
        A,
    ),
    Row(117, "clip_cov", lambda: uk.Loss(ClipCov(0.2, 0.35, 0.5, 1.5), TOKENS), clip_cov, A),
    Row(118, "kl_cov", lambda: uk.Loss(KLCov(0.3, 0.5), TOKENS), kl_cov, A),
    Row(119, "m2po, current policy", lambda: uk.Loss(Scaled(Ratio(), SecondMoment(0.05)), TOKENS), m2po, A),
    Row(
        120,
        "m2po, stored policies",
        lambda: uk.Loss(PolicyGradient(kl=None), uk.Weighted(TOKENS, "keep")),
        token_mean(lambda o: clip(o) * o.keep),
        A + " keep",
    ),
    Row(121, "rho-1, top half", lambda: 2 * uk.Loss(Scaled(SFT(), TopExcess(0.5)), TOKENS), rho_1, "ref_logp"),
]
