"""Preferences: losses of pairs of sequences, as functions of the scores R+ and R- of the chosen and the rejected one.

By default R is the log-ratio to the reference policy; ``score`` selects another one (see ``scores``). Other published
losses are sums: ``Loss(DPO(), PairMean()) + Loss(ChosenNLL(), PairMean())`` is iterative reasoning preference
optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from unirl_kernels.objectives.arguments import Below1Half, NonNegative, Positive, Share
from unirl_kernels.objectives.loss import Metrics, Objective, Paradigm
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.scores import LogRatio, MeanLogRatio, Score
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "DPO",
    "EXO",
    "IPO",
    "NCA",
    "APODown",
    "APOZero",
    "BCOPair",
    "CalibratedDPO",
    "ConservativeDPO",
    "DPOPositive",
    "DiscoPOP",
    "Hinge",
    "RobustDPO",
    "SPPOHard",
    "ShiftedDPO",
]


class OfPairs(Objective):
    """Base of losses of pairs, with two common parameters.

    Args:
        beta: inverse temperature of the preference model, > 0.
        score: R of each sequence.
    """

    beta: Positive
    score: Score

    scope = "pair"

    def __call__(self, t: Tokens) -> Tensor:
        return self.of_scores(*t.pairs(self.score(t)))

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair, from the scores of its sequences."""
        raise NotImplementedError

    def metrics(self, t: Tokens) -> Metrics:
        """For each pair: ``rewards/chosen`` and ``rewards/rejected``, beta R; ``rewards/margins``, their difference;
        ``rewards/accuracies``, whether it is positive; ``logps/chosen`` and ``logps/rejected``, log pi of the
        sequences.
        """
        chosen, rejected = t.pairs(self.beta * self.score(t))
        of_chosen, of_rejected = t.pairs(t.sequence_sum(t.logp))
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": of_chosen,
            "logps/rejected": of_rejected,
        }


@dataclass(frozen=True)
class DPO(OfPairs):
    """Direct preference optimisation, -log sigma(beta (R(o+) - R(o-))), R the log-ratio to the reference policy.

        R(o) = sum_t log pi(o_t) / pi_ref(o_t),     divided by |o| when length-normalised

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7 (the sum); Shao et al. 2024 (arXiv:2402.03300v3), eq. 6
    (the mean). Its coefficient is +-beta sigma(beta (R(o-) - R(o+))); eq. 7 of Shao et al. prints it without beta
    and with log-ratios of tokens in place of those of sequences.

    Args:
        beta: inverse temperature of the preference model, > 0.
        length_normalized: divide each sequence's log-ratio by its length, as (6) does; R is then ``MeanLogRatio``.
        score: R; ``DPO(score=SequenceLogp())`` with ``ChosenNLL()`` is CPO (Xu et al. 2024, arXiv:2401.08417).

    Raises:
        TypeError: when ``beta`` is not a number.
        ValueError: when ``beta`` is not positive, or R is given twice.
    """

    beta: Positive = 0.1
    length_normalized: bool = False
    score: Score = LogRatio()

    paradigm = Paradigm(
        "DPO",
        "(6), (7)",
        "q ~ P_sft, o+, o- ~ pi_sft",
        "rule or model",
        "log sigma(beta R(o+) - beta R(o-)), R = log pi / pi_ref of the sequence",
        "+-beta sigma(beta R(o-) - beta R(o+))",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length_normalized:
            if self.score not in (LogRatio(), MeanLogRatio()):
                raise ValueError(f"length_normalized must be False with score={self.score}")
            object.__setattr__(self, "score", MeanLogRatio())

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class ConservativeDPO(OfPairs):
    """-(1 - e) log sigma(beta d) - e log sigma(-beta d), d = R+ - R-: labels flipped with probability e.

    Source: Mitchell 2023, "A note on DPO with noisy preferences"; TRL, OpenRLHF ``label_smoothing``.

    Args:
        smoothing: e, in [0, 0.5).
    """

    beta: Positive = 0.1
    smoothing: Below1Half = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        d = self.beta * (chosen - rejected)
        return -(1 - self.smoothing) * logsigmoid(d) - self.smoothing * logsigmoid(-d)


@dataclass(frozen=True)
class RobustDPO(OfPairs):
    """(-(1 - e) log sigma(beta d) + e log sigma(-beta d)) / (1 - 2 e), unbiased under flipped labels.

    Source: Chowdhury et al. 2024 (arXiv:2403.00409); TRL ``robust``.

    Args:
        smoothing: e, in [0, 0.5).
    """

    beta: Positive = 0.1
    smoothing: Below1Half = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        d, e = self.beta * (chosen - rejected), self.smoothing
        return (-(1 - e) * logsigmoid(d) + e * logsigmoid(-d)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge(OfPairs):
    """max(0, 1 - beta (R+ - R-)).  Zhao et al. 2023 (SLiC, arXiv:2305.10425); Liu et al. 2023 (RSO)."""

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return relu(1 - self.beta * (chosen - rejected))


@dataclass(frozen=True)
class IPO(OfPairs):
    """(R+ - R- - 1 / (2 beta))^2.  Azar et al. 2023 (arXiv:2310.12036), eq. 17; R averaged as in TRL and AReaL.

    OpenRLHF sums: ``score=LogRatio()``.
    """

    beta: Positive = 0.1
    score: Score = MeanLogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.square(chosen - rejected - 1 / (2 * self.beta))


@dataclass(frozen=True)
class EXO(OfPairs):
    """KL(q || (1 - e, e)) of q = (sigma(beta d), sigma(-beta d)), d = R+ - R-.

    Source: Ji et al. 2024 (arXiv:2402.00856), eq. 16; TRL ``exo_pair``.

    Args:
        smoothing: e, in (0, 0.5).
    """

    beta: Positive = 0.1
    smoothing: Below1Half = 1e-3
    score: Score = LogRatio()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be positive, got {self.smoothing}")

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        d = self.beta * (chosen - rejected)
        e = torch.full_like(d, self.smoothing)
        won, lost = logsigmoid(d), logsigmoid(-d)
        return torch.exp(won) * (won - torch.log1p(-e)) + torch.exp(lost) * (lost - torch.log(e))


@dataclass(frozen=True)
class NCA(OfPairs):
    """-log sigma(beta R+) - 1/2 log sigma(-beta R+) - 1/2 log sigma(-beta R-).

    Source: Chen et al. 2024 (arXiv:2402.05369); TRL ``nca_pair``.
    """

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        up, down = self.beta * chosen, self.beta * rejected
        return -logsigmoid(up) - 0.5 * logsigmoid(-up) - 0.5 * logsigmoid(-down)


@dataclass(frozen=True)
class BCOPair(OfPairs):
    """-log sigma(beta R+) - log sigma(-beta R-), no shift.  Jung et al. 2024 (arXiv:2404.04656); TRL ``bco_pair``.

    ``DPO`` and ``BCOPair`` with weights, and a likelihood, are MPO (Wang et al. 2024, arXiv:2411.10442).
    """

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self.beta * chosen) - logsigmoid(-self.beta * rejected)


@dataclass(frozen=True)
class SPPOHard(OfPairs):
    """(R+ - 1 / (2 beta))^2 + (R- + 1 / (2 beta))^2.  Wu et al. 2024 (arXiv:2405.00675), eq. 4.7; TRL ``sppo_hard``."""

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.square(chosen - 0.5 / self.beta) + torch.square(rejected + 0.5 / self.beta)


@dataclass(frozen=True)
class APOZero(OfPairs):
    """1 - sigma(beta R+) + sigma(beta R-).  D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7; TRL ``apo_zero``."""

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)


@dataclass(frozen=True)
class APODown(OfPairs):
    """sigma(beta R+) + 1 - sigma(beta (R+ - R-)).  D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8; TRL."""

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))


@dataclass(frozen=True)
class DiscoPOP(OfPairs):
    """(1 - g) (-log sigma(x)) + g e^(-x), x = beta (R+ - R-), g = sigma(x / tau).

    Source: Lu et al. 2024 (arXiv:2406.08414), eq. 5; TRL ``discopop``.

    Args:
        tau: > 0.
    """

    beta: Positive = 0.1
    tau: Positive = 0.05
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        x = self.beta * (chosen - rejected)
        gate = torch.sigmoid(x / self.tau)
        return -(1 - gate) * logsigmoid(x) + gate * ratio(-x)


@dataclass(frozen=True)
class ShiftedDPO(OfPairs):
    """-log sigma(beta (R+ - f R-)), which keeps the chosen answer from becoming less likely.

    Source: Yang et al. 2025 (DPO-Shift, arXiv:2502.07599).

    Args:
        f: in [0, 1].
    """

    beta: Positive = 0.1
    f: Share = 0.95
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen - self.f * rejected))


@dataclass(frozen=True)
class CalibratedDPO(OfPairs):
    """-log sigma(R+ - R-) + (R+ - 1 / (2 beta))^2 + (R- + 1 / (2 beta))^2.

    Source: Xiao et al. 2024 (Cal-DPO, arXiv:2412.14516).
    """

    beta: Positive = 0.1
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        scale = 0.5 / self.beta
        return -logsigmoid(chosen - rejected) + torch.square(chosen - scale) + torch.square(rejected + scale)


@dataclass(frozen=True)
class DPOPositive(OfPairs):
    """-log sigma(beta (R+ - R- - penalty max(0, -R+))).  Pal et al. 2024 (DPOP, arXiv:2402.13228).

    Args:
        penalty: for a chosen answer that is less likely than under the reference, >= 0.
    """

    beta: Positive = 0.1
    penalty: NonNegative = 5.0
    score: Score = LogRatio()

    def of_scores(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen - rejected - self.penalty * relu(-chosen)))
