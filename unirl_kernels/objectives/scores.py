"""Scores, one per sequence, which preference losses compare: the argument ``score`` of a loss of pairs.

All except the last three are functions of R, the sequence's log-ratio to the reference policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.objectives.arguments import Field, NonNegative, Parameters, Positive, Share
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "AlphaDivergence",
    "AlphaReward",
    "ChiSquared",
    "DesensitizedLogRatio",
    "ForwardKL",
    "JensenShannon",
    "LengthMean",
    "LogRatio",
    "MeanLogRatio",
    "MeanLogp",
    "SequenceLogp",
    "WeightedLogRatio",
]


class Score(Parameters):
    """Base of scores: [S] of tokens."""

    def __call__(self, t: Tokens) -> Tensor:
        """The score of each sequence."""
        raise NotImplementedError


@dataclass(frozen=True)
class LogRatio(Score):
    """R = sum_t log pi / pi_ref.  Rafailov et al. 2023 (arXiv:2305.18290).

    Args:
        reference: a field with log pi_ref of whole sequences, [S], computed before; None: ``ref_logp`` of tokens.
    """

    reference: Field | None = None

    def __call__(self, t: Tokens) -> Tensor:
        if self.reference is None:
            return t.sequence_sum(t.logp - t.ref_logp)
        return t.sequence_sum(t.logp) - t.sequence_field(self.reference)


@dataclass(frozen=True)
class MeanLogRatio(Score):
    """R / |o|.  TRL ``sigmoid_norm`` and ``ipo``; open-instruct ``dpo_norm``.

    Args:
        against: the field with log pi_ref.
    """

    against: Field = "ref_logp"

    def __call__(self, t: Tokens) -> Tensor:
        return t.sequence_mean(t.logp - getattr(t, self.against))


@dataclass(frozen=True)
class WeightedLogRatio(Score):
    """sum_t w_t log pi / pi_ref: token weights, or the tokens sampled by SamPO (Lu et al. 2024, arXiv:2406.10957).

    Args:
        weight: the field with w.
    """

    weight: Field = "token_weight"

    def __call__(self, t: Tokens) -> Tensor:
        return t.sequence_sum(getattr(t, self.weight) * (t.logp - t.ref_logp))


@dataclass(frozen=True)
class DesensitizedLogRatio(Score):
    """R, tokens beyond the length of the pair's shorter sequence times alpha: LD-DPO.

    Source: Liu et al. 2024 (arXiv:2409.06411); TRL ``ld_alpha``.

    Args:
        alpha: in [0, 1].
    """

    alpha: Share = 0.5

    def __call__(self, t: Tokens) -> Tensor:
        chosen, rejected = t.pairs(torch.arange(t.n_sequences, device=t.logp.device))
        shorter = torch.minimum(t.lengths[chosen], t.lengths[rejected])
        shared = torch.empty_like(t.lengths).index_put((chosen,), shorter).index_put((rejected,), shorter)
        log_ratio = t.logp - t.ref_logp
        return t.sequence_sum(torch.where(t.positions < t.to_tokens(shared), log_ratio, self.alpha * log_ratio))


@dataclass(frozen=True)
class LengthMean(Score):
    """R / |o|, R another score.  TRL ``sigmoid_norm`` and ``ipo`` with an f-divergence or ``ld_alpha``.

    Args:
        of: R.
    """

    of: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        return self.of(t) / t.lengths.clamp(min=1)


@dataclass(frozen=True)
class ForwardKL(Score):
    """1 - e^(-R), f-DPO with the forward KL divergence.  Wang et al. 2023 (arXiv:2309.16240); TRL ``forward_kl``.

    Args:
        of: R.
    """

    of: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        return 1 - ratio(-self.of(t))


@dataclass(frozen=True)
class JensenShannon(Score):
    """log 2 sigma(R), f-DPO with the Jensen-Shannon divergence.  Wang et al. 2023; TRL ``js_divergence``.

    Args:
        of: R.
    """

    of: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        return math.log(2) + logsigmoid(self.of(t))


@dataclass(frozen=True)
class AlphaDivergence(Score):
    """(e^((alpha - 1) R) - 1) / (alpha - 1), f-DPO; R itself at alpha = 1.  Wang et al. 2023.

    TRL 1.16 ``alpha_divergence``; alpha here is 1 - alpha of TRL's older code.

    Args:
        alpha: >= 0.
        of: R.
    """

    alpha: NonNegative = 0.5
    of: Score = LogRatio()

    def __call__(self, t: Tokens) -> Tensor:
        r, power = self.of(t), self.alpha - 1
        return r if abs(power) < 1e-6 else (ratio(power * r) - 1) / power


@dataclass(frozen=True)
class ChiSquared(Score):
    """e^min(R, 20) + R, the link of the mixed chi-squared divergence.  Huang et al. 2024 (chi-PO, arXiv:2407.13399)."""

    def __call__(self, t: Tokens) -> Tensor:
        r = LogRatio()(t)
        return torch.exp(r.clamp(max=20)) + r


@dataclass(frozen=True)
class SequenceLogp(Score):
    """sum_t log pi, no reference.  Xu et al. 2024 (CPO, arXiv:2401.08417)."""

    def __call__(self, t: Tokens) -> Tensor:
        return t.sequence_sum(t.logp)


@dataclass(frozen=True)
class MeanLogp(Score):
    """mean_t log pi, no reference.  Meng et al. 2024 (SimPO, arXiv:2405.14734)."""

    def __call__(self, t: Tokens) -> Tensor:
        return t.sequence_mean(t.logp)


@dataclass(frozen=True)
class AlphaReward(Score):
    """(1 - P^(-alpha)) / alpha with log P = mean_t log pi.  Gupta et al. 2025 (AlphaPO, arXiv:2501.03884).

    Args:
        alpha: > 0; towards 0 it is ``MeanLogp``.
    """

    alpha: Positive = 0.25

    def __call__(self, t: Tokens) -> Tensor:
        return (1 - ratio(-self.alpha * t.sequence_mean(t.logp))) / self.alpha
