"""Losses of single judged sequences. The field ``label``, [S], is not 0 if a sequence is desirable.

Each token of a sequence gets the loss of the sequence, so that ``SequenceMean()`` is the mean over sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.objectives.arguments import Field, NonNegative, Number, Positive
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.scores import LogRatio, Score
from unirl_kernels.objectives.tokens import Tokens

__all__ = ["BCO", "KTO", "NPO", "APOZeroUnpaired", "KTOBatch"]


class OfSequences(Objective):
    """Base of losses of judged sequences.

    Args:
        beta: inverse temperature of the preference model, > 0.
        score: R of each sequence.
    """

    beta: Positive
    score: Score

    scope = "sequence"

    def metrics(self, t: Tokens) -> Metrics:
        """``rewards/chosen``, ``rewards/rejected``, ``logps/chosen``, ``logps/rejected``: beta R and log pi of the
        desirable sequences, and of the others.
        """
        good = desirable(t)
        reward, logp = self.beta * self.score(t), t.sequence_sum(t.logp)
        of = {"chosen": good, "rejected": ~good}
        return {f"{name}/{k}": (x, of[k]) for name, x in (("rewards", reward), ("logps", logp)) for k in of}


def desirable(t: Tokens) -> Tensor:
    """[S] bool."""
    return t.sequence_field("label") != 0


@dataclass(frozen=True)
class KTO(OfSequences):
    """w (1 - sigma(beta (R - kl))) where desirable, else w (1 - sigma(beta (kl - R))).

    Field ``kl``: KL(pi || pi_ref), [] or [S], of which what is below 0 counts as 0.

    Source: Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7 and 8; TRL ``kto``.

    Args:
        desirable, undesirable: w, >= 0.
    """

    beta: Positive = 0.1
    desirable: NonNegative = 1.0
    undesirable: NonNegative = 1.0
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        kl = self._kl(t).clamp(min=0).detach()
        good = torch.sigmoid(-self.beta * (self.score(t) - kl))
        bad = torch.sigmoid(-self.beta * (kl - self.score(t)))
        return t.to_tokens(torch.where(desirable(t), self.desirable * good, self.undesirable * bad))

    def _kl(self, t: Tokens) -> Tensor:
        return t.sequence_field("kl")

    def metrics(self, t: Tokens) -> Metrics:
        """Those of judged sequences, and ``reference_kl``."""
        return {**super().metrics(t), "reference_kl": self._kl(t).clamp(min=0)}


@dataclass(frozen=True)
class KTOBatch(KTO):
    """``KTO`` whose KL is the mean of R over the sequences of the batch, without a gradient."""

    scope = "batch"

    def _kl(self, t: Tokens) -> Tensor:
        r = self.score(t)
        return r.mean().expand_as(r)


@dataclass(frozen=True)
class APOZeroUnpaired(OfSequences):
    """1 - sigma(beta R) where desirable, else sigma(beta R).  D'Oosterlinck et al. 2024 (arXiv:2408.06266); TRL."""

    beta: Positive = 0.1
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        reward = self.beta * self.score(t)
        return t.to_tokens(torch.sigmoid(torch.where(desirable(t), -reward, reward)))


@dataclass(frozen=True)
class BCO(OfSequences):
    """-log sigma(beta R - shift) where desirable, else -log sigma(shift - beta R).

    Source: Jung et al. 2024 (arXiv:2404.04656).

    Args:
        shift: the running mean of beta R over both kinds of sequences.
    """

    beta: Positive = 0.1
    shift: Number = 0.0
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        reward = self.beta * self.score(t) - self.shift
        return t.to_tokens(-logsigmoid(torch.where(desirable(t), reward, -reward)))


@dataclass(frozen=True)
class NPO(Objective):
    """-(2 / beta) log sigma(-beta log pi / pi_ref) of a sequence to be unlearned.

    Source: Zhang et al. 2024 (arXiv:2404.05868).

    Args:
        beta: > 0.
        reference: the field with log pi_ref.
    """

    beta: Positive = 0.1
    reference: Field = "ref_logp"

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        log_ratio = t.sequence_sum(t.logp - getattr(t, self.reference))
        return t.to_tokens(-2 / self.beta * logsigmoid(-self.beta * log_ratio))
