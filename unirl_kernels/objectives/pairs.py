"""Losses of pairs outside of DPO's family: without a reference, with rewards, with a likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.objectives.arguments import Below1Half, Field, NonNegative, Number, Positive
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.preference import OfPairs
from unirl_kernels.objectives.scores import LogRatio, MeanLogp, Score
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "AOT",
    "ORPO",
    "REBEL",
    "XPO",
    "AOTUnpaired",
    "BetaDPO",
    "ChosenNLL",
    "OddsRatio",
    "OffsetDPO",
    "SimPER",
    "SimPO",
]


@dataclass(frozen=True)
class SimPO(OfPairs):
    """-log sigma(beta (R+ - R-) - gamma), R = mean log pi.  Meng et al. 2024 (arXiv:2405.14734), eq. 6; TRL CPO.

    With ``score=AlphaReward()`` it is AlphaPO (Gupta et al. 2025, arXiv:2501.03884).

    Args:
        gamma: margin, >= 0.
    """

    beta: Positive = 2.0
    gamma: NonNegative = 1.0
    score: Score = MeanLogp()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class SimPER(OfPairs):
    """e^R- - e^R+, R = mean log pi: inverse perplexities, no parameter.  Xiao et al. 2025 (arXiv:2502.00883).

    Args:
        beta: of the metrics alone.
    """

    beta: Positive = 1.0
    score: Score = MeanLogp()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.exp(rejected) - torch.exp(chosen)


@dataclass(frozen=True)
class OffsetDPO(OfPairs):
    """-log sigma(beta (R+ - R-) - alpha (r+ - r-)), r the rewards: field ``reward``, [S].

    Source: Amini et al. 2024 (ODPO, arXiv:2402.10571), with the offset alpha (r+ - r-).

    Args:
        alpha: of the rewards, >= 0.
    """

    beta: Positive = 0.1
    alpha: NonNegative = 1.0
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        chosen, rejected = t.pairs(self.beta * self.score(t) - self.alpha * t.sequence_field("reward"))
        return -logsigmoid(chosen - rejected)


@dataclass(frozen=True)
class REBEL(OfPairs):
    """(beta (R+ - R-) - (r+ - r-))^2, r the rewards: field ``reward``, [S].

    Source: Gao et al. 2024 (arXiv:2404.16767), with beta = 1 / eta; the squared distance of RPO (arXiv:2406.11704).
    """

    beta: Positive = 1.0
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        chosen, rejected = t.pairs(self.beta * self.score(t) - t.sequence_field("reward"))
        return torch.square(chosen - rejected)


@dataclass(frozen=True)
class ChosenNLL(Objective):
    """-log pi(o+), divided by |o+|: the likelihood beside a preference.  Pang et al. 2024 (arXiv:2404.19733)."""

    scope = "pair"

    def __call__(self, t: Tokens) -> Tensor:
        return -t.pairs(t.sequence_mean(t.logp))[0]

    def metrics(self, t: Tokens) -> Metrics:
        """``nll_loss`` of each pair."""
        return {"nll_loss": self(t)}


@dataclass(frozen=True)
class OddsRatio(OfPairs):
    """-beta log sigma(log odds(P+) / odds(P-)), log P = mean log pi, odds(P) = P / (1 - P). inf where P+ = 1.

    Source: Hong et al. 2024 (ORPO, arXiv:2403.07691), eq. 4 and 7.

    Args:
        beta: of the loss, > 0.
        answer: a field that is not 0 at the tokens that P is a mean of; None: all.
    """

    beta: Positive = 0.1
    answer: Field | None = None
    score: Score = MeanLogp()

    def __call__(self, t: Tokens) -> Tensor:
        chosen, rejected = t.pairs(self._mean(t))
        log_odds = chosen - rejected - torch.log(-torch.expm1(chosen)) + torch.log(-torch.expm1(rejected))
        return -self.beta * logsigmoid(log_odds)

    def _mean(self, t: Tokens) -> Tensor:
        if self.answer is None:
            return t.sequence_mean(t.logp)
        counted = (getattr(t, self.answer) != 0) & t.valid
        total = t.sequence_sum(torch.where(counted, t.logp, 0))
        return total / t.sequence_sum(counted).clamp(min=1)


@dataclass(frozen=True)
class ORPO(OddsRatio):
    """-log pi(o+) / |o+| - beta log sigma(log odds(P+) / odds(P-)).  Hong et al. 2024 (arXiv:2403.07691), eq. 6.

    TRL averages the first term over all tokens of the batch's chosen prompts and answers: a sum with ``OddsRatio``.
    """

    def __call__(self, t: Tokens) -> Tensor:
        return ChosenNLL()(t) + super().__call__(t)


@dataclass(frozen=True)
class XPO(OfPairs):
    """DPO's loss + alpha log pi of the sequence that the reference sampled: field ``from_reference``, [S].

    Source: Xie et al. 2024 (arXiv:2405.21046), Algorithm 1; TRL.

    Args:
        alpha: of the optimism, >= 0.
    """

    beta: Positive = 0.1
    alpha: NonNegative = 1e-5
    score: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        chosen, rejected = t.pairs(self.score(t))
        flagged = t.sequence_field("from_reference") != 0
        of_chosen, of_rejected = t.pairs(torch.where(flagged, t.sequence_sum(t.logp), 0))
        return -logsigmoid(self.beta * (chosen - rejected)) + self.alpha * (of_chosen + of_rejected)


@dataclass(frozen=True)
class AOT(OfPairs):
    """-(1 - e) log sigma(beta d_i) - e log sigma(-beta d_i): the i-th smallest margin of pi over that of pi_ref.

        d = sort(log pi+ - log pi-) - sort(log pi_ref+ - log pi_ref-)

    Source: Melnyk et al. 2024 (arXiv:2406.05882); TRL ``aot``.

    Args:
        smoothing: e, in [0, 0.5).
    """

    beta: Positive = 0.1
    smoothing: Below1Half = 0.0
    score: Score = LogRatio()

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        return self._smoothed(self._margins(t, t.logp) - self._margins(t, t.ref_logp))

    @staticmethod
    def _margins(t: Tokens, logp: Tensor) -> Tensor:
        chosen, rejected = t.pairs(t.sequence_sum(logp))
        return torch.sort(chosen - rejected).values

    def _smoothed(self, d: Tensor) -> Tensor:
        return -(1 - self.smoothing) * logsigmoid(self.beta * d) - self.smoothing * logsigmoid(-self.beta * d)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """``AOT`` of the i-th smallest score of the chosen and of the rejected: d = sort(R+) - sort(R-).

    Source: Melnyk et al. 2024 (arXiv:2406.05882); TRL ``aot_unpaired``.
    """

    def __call__(self, t: Tokens) -> Tensor:
        chosen, rejected = t.pairs(self.score(t))
        return self._smoothed(torch.sort(chosen).values - torch.sort(rejected).values)


@dataclass(frozen=True)
class BetaDPO(OfPairs):
    """DPO whose beta follows the batch: beta (1 + alpha (mean of beta (R+ - R-) - margin)), without a gradient.

    Source: Wu et al. 2024 (arXiv:2407.08639), batch level.

    Args:
        alpha: how far it follows, >= 0.
        margin: the mean at which beta stays, in the paper a moving average.
        least: of the beta that is used, > 0.
    """

    beta: Positive = 0.1
    alpha: NonNegative = 0.6
    margin: Number = 0.0
    least: Positive = 1e-3
    score: Score = LogRatio()

    scope = "batch"

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        mean = (self.beta * (chosen - rejected)).mean().detach()
        beta = (self.beta * (1 + self.alpha * (mean - self.margin))).clamp(min=self.least)
        return -logsigmoid(beta * (chosen - rejected))
