"""Objectives of groups. Sequences with the same field ``group``, [S], form a group, such as the samples of a question.

Each token of a group gets the loss of the group, so that ``GroupMean()`` is the mean over groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from unirl_kernels.objectives.arguments import Number, Positive
from unirl_kernels.objectives.loss import Objective
from unirl_kernels.objectives.scores import LogRatio, MeanLogRatio, Score, SequenceLogp
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["REAL", "TPO", "InfoNCA", "PlackettLuce", "TargetPolicy"]


class OfGroups(Objective):
    """Base of objectives of groups."""

    scope = "batch"


def group_lse(t: Tokens, x: Tensor, of: Tensor | None = None) -> Tensor:
    """log sum exp of one value per sequence, [S], over the sequences of the same group: [S].

    Args:
        x: [S].
        of: [S] or [S, S] bool, which sequences to include; None: all. Without any the result is -inf.
    """
    counted = t.same_group() if of is None else t.same_group() & of
    return torch.logsumexp(torch.where(counted, x, -torch.inf), -1)


@dataclass(frozen=True)
class REAL(OfGroups):
    """log(1 + sum over bad of e^(R / tau)) + log(1 + sum over good of e^(-R / tau)): answers as labels.

    A sequence is good where the sequence's mean advantage is positive. Groups of one kind give 0.

    Source: ms-swift ``real``.

    Args:
        tau: > 0.
        score: R.
    """

    tau: Positive = 0.5
    score: Score = MeanLogRatio("old_logp")

    def __call__(self, t: Tokens) -> Tensor:
        r = self.score(t) / self.tau
        good = t.sequence_mean(t.advantage) > 0
        bad_part = softplus(group_lse(t, r, ~good))
        good_part = softplus(group_lse(t, -r, good))
        both = (t.group_sum(good.to(r.dtype)) > 0) & (t.group_sum((~good).to(r.dtype)) > 0)
        return t.to_tokens(torch.where(both, bad_part + good_part, 0))


@dataclass(frozen=True)
class TargetPolicy(OfGroups):
    """-sum_i q_i log p_i: p the softmax of log pi over the group, q that of log pi_old + u / eta.

    Field ``advantage``: u, [S], the group's rewards with mean 0 and variance 1.

    Source: "Target policy optimization" 2026 (arXiv:2604.06159).

    Args:
        eta: temperature of the target, > 0.
    """

    eta: Positive = 1.0

    def __call__(self, t: Tokens) -> Tensor:
        target = t.sequence_sum(t.old_logp) + t.sequence_field("advantage") / self.eta
        q = torch.exp(target - group_lse(t, target)).detach()
        logp = t.sequence_sum(t.logp)
        return t.to_tokens(-t.group_sum(q * (logp - group_lse(t, logp))))


@dataclass(frozen=True)
class InfoNCA(OfGroups):
    """-sum_i softmax(r / alpha)_i log softmax(beta R)_i over the group, r the rewards: field ``reward``, [S].

    Source: Chen et al. 2024 (arXiv:2402.05369).

    Args:
        beta, alpha: > 0.
        score: R.
    """

    beta: Positive = 0.1
    alpha: Positive = 1.0
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        target, r = t.sequence_field("reward") / self.alpha, self.beta * self.score(t)
        q = torch.exp(target - group_lse(t, target))
        return t.to_tokens(-t.group_sum(q * (r - group_lse(t, r))))


@dataclass(frozen=True)
class PlackettLuce(OfGroups):
    """-sum_i log of e^(beta R_i) / sum over what is ranked no better of e^(beta R_j), the places up to ``places``.

    Field ``rank``: [S], 0 for the group's best; no two are equal. With one place it is best of n.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), appendix A.3.

    Args:
        beta: > 0.
        places: how many of the group's ranks count, > 0; inf for all.
        score: R.
    """

    beta: Positive = 0.1
    places: Positive = float("inf")
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        r, rank = self.beta * self.score(t), t.sequence_field("rank")
        behind = rank.unsqueeze(0) >= rank.unsqueeze(1)
        lost = torch.where(rank < self.places, group_lse(t, r, behind) - r, 0)
        return t.to_tokens(t.group_sum(lost))


@dataclass(frozen=True)
class TPO(OfGroups):
    """-log sigma(beta (R+ - R-) - gamma) of the sequences of rank 0 and 1 of each group: groups of three, with gold.

    Add ``SFT()`` of the gold answers, rank 2, by ``Weighted(TokenMean(count), "gold")``.

    Source: Saeidi et al. 2024 (Triple preference optimization, arXiv:2405.16681); TRL ``sigmoid``; ``tpo-l`` with
    ``score=MeanLogp()``.

    Args:
        beta: > 0.
        gamma: margin.
        score: R.
    """

    beta: Positive = 0.01
    gamma: Number = 0.0
    score: Score = SequenceLogp()

    def __call__(self, t: Tokens) -> Tensor:
        r, rank = self.beta * self.score(t), t.sequence_field("rank")
        margin = t.group_sum(torch.where(rank == 0, r, 0)) - t.group_sum(torch.where(rank == 1, r, 0))
        return t.to_tokens(-logsigmoid(margin - self.gamma))
