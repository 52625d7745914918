"""Rows 1 to 15: maximum likelihood and what weighs its tokens."""

from __future__ import annotations

import torch

import unirl_kernels as uk
from tests.objectives.variants.rows import Row, k3, mean_of_means, plus, sg, token_mean
from unirl_kernels.objectives import DFT, EAFT, K3, SFT, ChordPhi, Entropy, ExcessLoss, Focal, Unlikelihood, ZLoss

TOKENS = uk.TokenMean()

ROWS = [
    Row(1, "sft, token mean", lambda: uk.Loss(SFT(), TOKENS), token_mean(lambda o: -o.logp)),
    Row(2, "sft", uk.sft, mean_of_means(lambda o: -o.logp)),
    Row(3, "rft", uk.rft, mean_of_means(lambda o: -o.advantage * o.logp), "advantage:verdict"),
    Row(3, "online rft", uk.online_rft, mean_of_means(lambda o: -o.advantage * o.logp), "advantage:verdict"),
    Row(
        4,
        "token weights",
        lambda: uk.Loss(SFT(), uk.Weighted(TOKENS, "token_weight")),
        token_mean(lambda o: -o.token_weight * o.logp),
        "token_weight",
    ),
    Row(
        5,
        "z-loss",
        lambda: uk.Loss(SFT(), TOKENS) + 1e-4 * uk.Loss(ZLoss(), TOKENS),
        token_mean(lambda o: -o.logp + 1e-4 * o.lse**2),
    ),
    Row(
        6,
        "confidence penalty",
        lambda: uk.Loss(SFT(), TOKENS) - 0.1 * uk.Loss(Entropy(), TOKENS),
        token_mean(lambda o: -o.logp - 0.1 * o.entropy),
    ),
    Row(7, "dft", lambda: uk.Loss(DFT(), TOKENS), token_mean(lambda o: -sg(o.logp.exp()) * o.logp)),
    Row(8, "focal 2", lambda: uk.Loss(Focal(2.0), TOKENS), token_mean(lambda o: -((1 - o.logp.exp()) ** 2) * o.logp)),
    Row(
        9,
        "focal 1.5",
        lambda: uk.Loss(Focal(1.5), TOKENS),
        token_mean(lambda o: -((1 - o.logp.exp()) ** 1.5) * o.logp),
    ),
    Row(
        10, "unlikelihood", lambda: uk.Loss(Unlikelihood(), TOKENS), token_mean(lambda o: -torch.log(1 - o.logp.exp()))
    ),
    Row(
        11,
        "chord phi",
        lambda: uk.Loss(ChordPhi(), TOKENS),
        token_mean(lambda o: -sg(o.logp.exp() * (1 - o.logp.exp())) * o.logp),
    ),
    Row(
        12,
        "eaft with the whole entropy",
        lambda: uk.Loss(EAFT(0.7), TOKENS),
        token_mean(lambda o: -sg((o.entropy / 3) ** 0.7) * o.logp),
    ),
    Row(
        13,
        "asft with k3",
        lambda: uk.Loss(DFT(), TOKENS) + 0.05 * uk.Loss(K3(), TOKENS),
        plus((1, token_mean(lambda o: -sg(o.logp.exp()) * o.logp)), (0.05, token_mean(k3))),
        "ref_logp",
    ),
    Row(
        14,
        "rho-1 with a threshold",
        lambda: uk.Loss(ExcessLoss(0.1), TOKENS),
        token_mean(lambda o: -o.logp * (o.ref_logp - sg(o.logp) > 0.1)),
        "ref_logp",
    ),
]
