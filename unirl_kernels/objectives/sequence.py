"""Objectives of whole sequences: ratios of sequences, and what depends on a token's place in one.

Each token of a sequence gets the value of the sequence: ``SequenceMean()`` is then the mean over sequences,
``FixedLength(1)`` weighs each by its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import AboveOne, Bound, Field, NonNegative, Parameters, Positive, Share
from unirl_kernels.objectives.loss import Metrics, Objective
from unirl_kernels.objectives.policy import ppo_kl
from unirl_kernels.objectives.ratios import BOUND, clip_metrics, clipped, ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "GMPO",
    "GSPO",
    "RLOO",
    "VESPO",
    "FutureKL",
    "GSPOToken",
    "SequenceCISPO",
    "SequenceImportanceWeighted",
    "SequenceSAPO",
    "SequenceTwoSidedClip",
]


LEAST = -18.420680743952367
"""log 1e-8."""


@dataclass(frozen=True)
class GSPO(Objective):
    """-min(s A, clip(s, 1 - low, 1 + high) A), s the geometric mean of the sequence's ratios.

    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 5 to 7; TRL ``importance_sampling_level="sequence"``. With
    ``FixedLength(1)`` it is LUSPO (arXiv:2602.05261).

    Args:
        low, high: as in ``Clip``.
    """

    low: Share = 3e-4
    high: NonNegative = 4e-4

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return clipped(self._ratio(t), t.advantage, self.low, self.high)

    def _ratio(self, t: Tokens) -> Tensor:
        return t.to_tokens(ratio(t.sequence_mean(t.logp - t.old_logp)))

    def metrics(self, t: Tokens) -> Metrics:
        """Those of ``Clip``."""
        return clip_metrics(self._ratio(t), t.advantage, self.low, self.high) | ppo_kl(t)


@dataclass(frozen=True)
class SequenceTwoSidedClip(GSPO):
    """``GSPO`` whose ratio is bounded where A < 0, too: -min(min(s, delta) A, clip(s, 1 - low, 1 + high) A).

    TRL ``delta`` with ``importance_sampling_level="sequence"``.

    Args:
        delta: the largest ratio that counts, > 1.
    """

    delta: AboveOne = 4.0

    def __call__(self, t: Tokens) -> Tensor:
        s = self._ratio(t)
        unclipped = s.clamp(max=self.delta) * t.advantage
        return -torch.minimum(unclipped, s.clamp(1 - self.low, 1 + self.high) * t.advantage)


@dataclass(frozen=True)
class SequenceCISPO(Objective):
    """-sg(clip(s, lower, upper)) A log pi, s the geometric mean of the sequence's ratios: ``CISPO`` of sequences.

    TRL ``cispo`` with ``importance_sampling_level="sequence"``.

    Args:
        lower, upper: of the ratio itself, >= 0.
    """

    lower: NonNegative = 0.0
    upper: NonNegative = 5.0

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        s = t.to_tokens(ratio(t.sequence_mean(t.logp - t.old_logp)))
        return -s.clamp(self.lower, self.upper).detach() * t.advantage * t.logp

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class GSPOToken(Objective):
    """``GSPO`` with the ratio sg(s) pi / sg(pi): the same value, each token with its own advantage and gradient.

    Source: Zheng et al. 2025 (arXiv:2507.18071), GSPO-token; verl ``gspo`` (bound 10), SkyRL, ms-swift.

    Args:
        low, high: as in ``Clip``.
        bound: of |log s|, in (0, 80].
    """

    low: Share = 3e-4
    high: NonNegative = 4e-4
    bound: Bound = BOUND

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return clipped(self._ratio(t), t.advantage, self.low, self.high)

    def _ratio(self, t: Tokens) -> Tensor:
        of_sequence = t.to_tokens(t.sequence_mean(t.logp - t.old_logp)).detach()
        return ratio(t.logp - t.logp.detach() + of_sequence, self.bound)

    def metrics(self, t: Tokens) -> Metrics:
        """Those of ``Clip``."""
        return clip_metrics(self._ratio(t), t.advantage, self.low, self.high) | ppo_kl(t)


@dataclass(frozen=True)
class SequenceSAPO(Objective):
    """``SAPO`` with the geometric mean of the sequence's ratios.  AReaL ``use_sapo_loss`` at the level of sequences.

    Args:
        positive, negative: as in ``SAPO``.
    """

    positive: Positive = 1.0
    negative: Positive = 1.05

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        s = t.to_tokens(ratio(t.sequence_mean(t.logp - t.old_logp)))
        positive, negative = torch.full_like(s, self.positive), torch.full_like(s, self.negative)
        tau = torch.where(t.advantage > 0, positive, negative)
        return -torch.sigmoid(tau * (s - 1)) * (4 / tau) * t.advantage

    def metrics(self, t: Tokens) -> Metrics:
        """``ppo_kl``."""
        return ppo_kl(t)


@dataclass(frozen=True)
class RLOO(Objective):
    """``Clip`` with the ratio of the whole sequence, the product of its tokens'.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740), the leave-one-out advantage; TRL ``RLOOTrainer``.

    Args:
        low, high: as in ``Clip``.
    """

    low: Share = 0.2
    high: NonNegative = 0.2

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return clipped(self._ratio(t), t.advantage, self.low, self.high)

    def _ratio(self, t: Tokens) -> Tensor:
        return t.to_tokens(ratio(t.sequence_sum(t.logp - t.old_logp)))

    def metrics(self, t: Tokens) -> Metrics:
        """Those of ``Clip``."""
        return clip_metrics(self._ratio(t), t.advantage, self.low, self.high) | ppo_kl(t)


@dataclass(frozen=True)
class GMPO(Objective):
    """-A exp(mean of the clipped log r): log r at most high where A > 0, at least -low where A < 0.

    Source: Zhao et al. 2025 (arXiv:2507.20673); TRL ``gmpo``, verl ``geo_mean``.

    Args:
        low, high: of the log-ratio, >= 0.
    """

    low: NonNegative = 0.4
    high: NonNegative = 0.4

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        log_ratio = t.logp - t.old_logp
        inside = torch.where(t.advantage > 0, log_ratio.clamp(max=self.high), log_ratio.clamp(min=-self.low))
        return -t.to_tokens(ratio(t.sequence_mean(inside))) * t.advantage

    def metrics(self, t: Tokens) -> Metrics:
        """``clip_fraction`` of tokens, ``/low``, ``/high``, ``ppo_kl``."""
        log_ratio = t.logp - t.old_logp
        below, above = (log_ratio < -self.low) & (t.advantage < 0), (log_ratio > self.high) & (t.advantage > 0)
        named = {"clip_fraction": below | above, "clip_fraction/low": below, "clip_fraction/high": above}
        return {name: x.to(log_ratio.dtype) for name, x in named.items()} | ppo_kl(t)


@dataclass(frozen=True)
class VESPO(Objective):
    """-sg(phi) A log pi, phi = e^lambda w^k e^(-lambda w), w the ratio of the sequence in [1e-8, e^20].

    k and lambda are those of the advantage's sign. log w sums token log-ratios that are bounded to [-20, 20].

    Source: Shen et al. 2026 (arXiv:2602.10693); TRL, Liger.

    Args:
        k_positive, lambda_positive: where A >= 0; >= 0.
        k_negative, lambda_negative: where A < 0; >= 0.
        rollout_weight: a field with pi_old / pi_rollout of each token, a factor of w; None for none.
    """

    k_positive: NonNegative = 2.0
    lambda_positive: NonNegative = 3.0
    k_negative: NonNegative = 3.0
    lambda_negative: NonNegative = 2.0
    rollout_weight: Field | None = None

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return -self._phi(t) * t.advantage * t.logp

    @torch.no_grad()
    def _phi(self, t: Tokens) -> Tensor:
        log_ratio = (t.logp - t.old_logp).clamp(-20, 20)
        if self.rollout_weight is not None:
            log_ratio = log_ratio + torch.log(getattr(t, self.rollout_weight)).clamp(LEAST, 20)
        log_w = t.to_tokens(t.sequence_sum(log_ratio).clamp(LEAST, 20))
        up = self.lambda_positive + self.k_positive * log_w - self.lambda_positive * torch.exp(log_w)
        down = self.lambda_negative + self.k_negative * log_w - self.lambda_negative * torch.exp(log_w)
        return torch.exp(torch.where(t.advantage >= 0, up, down))

    def metrics(self, t: Tokens) -> Metrics:
        """``phi`` and ``ppo_kl``."""
        return {"phi": self._phi(t)} | ppo_kl(t)


@dataclass(frozen=True)
class SequenceImportanceWeighted(Objective):
    """s f, s the geometric mean of the sequence's ratios with its gradient.

    TRL ``use_bias_correction_kl`` at the level of sequences.

    Args:
        objective: f, of token scope.
    """

    objective: Objective

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return t.to_tokens(ratio(t.sequence_mean(t.logp - t.old_logp))) * self.objective(t)


@dataclass(frozen=True)
class FutureKL(Parameters):
    """exp(sum over the tokens from t on of gamma^(k - t) log r_k), bounded to [low, high]: a weight for ``Scaled``.

    Tokens whose ratio is above ``delta`` add nothing; where A < 0 and the ratio is above ``safe`` the weight is bounded
    to [0.8, 1].

    Source: FIPO; ms-swift ``fipo``, slime.

    Args:
        gamma: decay, in [0, 1].
        low, high: of the weight, >= 0.
        delta, safe: of the ratio, > 1.
    """

    gamma: Share = 0.9
    low: NonNegative = 0.8
    high: NonNegative = 1.2
    delta: AboveOne = 10.0
    safe: AboveOne = 4.0

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        log_ratio = t.logp - t.old_logp
        r = ratio(log_ratio)
        future = t.sequence_scan(torch.where(r > self.delta, 0, log_ratio), self.gamma, reverse=True)
        weight = ratio(future).clamp(self.low, self.high)
        return torch.where((t.advantage < 0) & (r > self.safe), weight.clamp(0.8, 1.0), weight)
