"""Rows 155 to 167: groups of candidates, judged sequences without a partner."""

from __future__ import annotations

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.objectives.variants.data import RAGGED, Answer
from tests.objectives.variants.of_preferences import REF, B, R, dpo, log_sigma
from tests.objectives.variants.of_sequences import mean
from tests.objectives.variants.rows import Row, of_groups, of_sequences, plus, token_sum
from unirl_kernels.objectives import BCO, KTO, SFT, SPPO, TPO, APOZeroUnpaired, KTOBatch, MeanLogp, PlackettLuce

N_GOLD = RAGGED[4] + RAGGED[5]


def plackett_luce(group: list[Answer]) -> Tensor:
    """The product over positions of the probability that the best of the rest stands there."""
    ordered = sorted(group, key=lambda o: o.rank)
    return -sum(torch.log_softmax(torch.stack([B * R(o) for o in ordered[i:]]), 0)[0] for i in range(len(ordered)))


def best_of_n(group: list[Answer]) -> Tensor:
    ordered = sorted(group, key=lambda o: o.rank)
    return -torch.log_softmax(torch.stack([B * R(o) for o in ordered]), 0)[0]


def tpo(group: list[Answer]) -> Tensor:
    chosen, rejected, _ = sorted(group, key=lambda o: o.rank)
    return dpo(chosen.logp.sum() - rejected.logp.sum())


def tpo_l(group: list[Answer]) -> Tensor:
    chosen, rejected, _ = sorted(group, key=lambda o: o.rank)
    return -log_sigma(B * (mean(chosen.logp) - mean(rejected.logp)) - 0.2)


def gold_nll(answers: list[Answer]) -> Tensor:
    return token_sum(lambda o: -o.logp * o.gold)(answers) / sum(len(o) for o in answers if o.gold)


def kto(o: Answer, kl: Tensor) -> Tensor:
    kl = max(kl, 0 * kl)
    return 1.2 * (1 - torch.sigmoid(B * (R(o) - kl))) if o.label else 0.8 * (1 - torch.sigmoid(B * (kl - R(o))))


def kto_batch(answers: list[Answer]) -> Tensor:
    kl = sum(R(o) for o in answers).detach() / len(answers)
    return of_sequences(lambda o: kto(o, kl))(answers)


def apo_zero_unpaired(o: Answer) -> Tensor:
    return 1 - torch.sigmoid(B * R(o)) if o.label else torch.sigmoid(B * R(o))


def bco(o: Answer) -> Tensor:
    return -log_sigma(B * R(o) - 0.1) if o.label else -log_sigma(-(B * R(o) - 0.1))


ROWS = [
    Row(
        155,
        "plackett-luce",
        lambda: uk.Loss(PlackettLuce(B), uk.GroupMean()),
        of_groups(plackett_luce),
        REF + " group rank",
    ),
    Row(
        155, "best of n", lambda: uk.Loss(PlackettLuce(B, 1), uk.GroupMean()), of_groups(best_of_n), REF + " group rank"
    ),
    Row(
        159,
        "tpo",
        lambda: uk.Loss(TPO(B), uk.GroupMean()) + 0.5 * uk.Loss(SFT(), uk.Weighted(uk.TokenMean(N_GOLD), "gold")),
        plus((1, of_groups(tpo)), (0.5, gold_nll)),
        "group rank gold",
    ),
    Row(159, "tpo-l", lambda: uk.Loss(TPO(B, 0.2, MeanLogp()), uk.GroupMean()), of_groups(tpo_l), "group rank"),
    Row(
        163, "kto, KL given", lambda: uk.Loss(KTO(B, 1.2, 0.8)), of_sequences(lambda o: kto(o, o.kl)), REF + " label kl"
    ),
    Row(164, "kto, KL of the batch", lambda: uk.Loss(KTOBatch(B, 1.2, 0.8)), kto_batch, REF + " label"),
    Row(165, "apo_zero_unpaired", lambda: uk.Loss(APOZeroUnpaired(B)), of_sequences(apo_zero_unpaired), REF + " label"),
    Row(166, "bco, unpaired", lambda: uk.Loss(BCO(B, 0.1)), of_sequences(bco), REF + " label"),
    Row(
        167,
        "sppo, soft win rates",
        lambda: uk.Loss(SPPO(B)),
        of_sequences(lambda o: (R(o) - (o.win_rate - 0.5) / B) ** 2),
        REF + " win_rate",
    ),
]
