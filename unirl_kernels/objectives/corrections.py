"""Weights for samples of another policy than pi_old: importance ratios w, truncated or masked.

    Scaled(Clip(), TruncatedRatio()) + 0.04 * Loss(K3())            # TRL, NeMo RL, slime: the penalty is not weighted
    Scaled(PolicyGradient(), IcePop())                              # ms-swift: it is

``of="logp"`` uses the ratio of the trained policy (verl's bypass mode), without a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels.objectives.arguments import Field, NonNegative, Number, Parameters, Positive
from unirl_kernels.objectives.compose import Rule
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "BatchNormalized",
    "IcePop",
    "OffPolicyMask",
    "SequenceIcePop",
    "SequenceMask",
    "SequenceTruncatedRatio",
    "TruncatedRatio",
]


@dataclass(frozen=True)
class RolloutRule(Parameters):
    """Base of weights by the ratio of two policies.

    Args:
        of: log-probabilities under the policy whose gradient is wanted: ``old_logp``, or ``logp`` for pi itself.
        against: the field with those under the policy that sampled.
    """

    of: Field = "old_logp"
    against: Field = "rollout_logp"

    def log_ratio(self, t: Tokens) -> Tensor:
        return getattr(t, self.of).detach() - getattr(t, self.against)


@dataclass(frozen=True)
class TruncatedRatio(RolloutRule):
    """clip(w, low, high), truncated importance sampling.  Yao et al. 2025 (TIS); TRL ``token_truncate``, verl, slime.

    Args:
        low, high: of the ratio, >= 0.
    """

    low: NonNegative = 0.0
    high: NonNegative = 2.0

    def __call__(self, t: Tokens) -> Tensor:
        return ratio(self.log_ratio(t)).clamp(self.low, self.high)


@dataclass(frozen=True)
class IcePop(RolloutRule):
    """w where low <= w <= high, else 0.  Ling Team 2025 (IcePop); TRL ``token_mask``, NeMo RL, SkyRL ``rollout_is``.

    Args:
        low, high: of the ratio, >= 0.
    """

    low: NonNegative = 0.5
    high: NonNegative = 5.0

    def __call__(self, t: Tokens) -> Tensor:
        w = ratio(self.log_ratio(t))
        return torch.where((w >= self.low) & (w <= self.high), w, 0)


@dataclass(frozen=True)
class SequenceTruncatedRatio(RolloutRule):
    """clip(W, low, high), W the ratio of the whole sequence.  TRL ``sequence_truncate``, verl ``rollout_is: sequence``.

    Args:
        low, high: of the ratio, >= 0.
    """

    low: NonNegative = 0.0
    high: NonNegative = 3.0

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return t.to_tokens(ratio(t.sequence_sum(self.log_ratio(t))).clamp(self.low, self.high))


@dataclass(frozen=True)
class SequenceIcePop(RolloutRule):
    """W where low <= W <= high, else 0, W the ratio of the whole sequence.  TRL ``sequence_mask``.

    Args:
        low, high: of the ratio, >= 0.
    """

    low: NonNegative = 0.0
    high: NonNegative = 3.0

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        w = ratio(t.sequence_sum(self.log_ratio(t)))
        return t.to_tokens(torch.where((w >= self.low) & (w <= self.high), w, 0))


@dataclass(frozen=True)
class SequenceMask(RolloutRule):
    """1 for sequences whose mean log-ratio lies in [low, high], else 0.

    By ``exp(low)`` and ``exp(high)`` NeMo RL's ``seq-mask-tis``. verl's ``rollout_rs: seq_mean_k1`` bounds the mean of
    -log w: its bounds (a, b) are low = -log b and high = -log a here.

    Args:
        low, high: of the mean of log w, nats.
    """

    low: Number = -0.001
    high: Number = 0.001

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        mean = t.sequence_mean(self.log_ratio(t))
        return t.to_tokens(((mean >= self.low) & (mean <= self.high)).to(mean.dtype))


@dataclass(frozen=True)
class BatchNormalized(Parameters):
    """w / mean(w), the mean over the tokens of the batch; w itself if the mean is at most 1e-8.

    verl ``rollout_is_batch_normalize`` for weights of tokens; of weights of sequences it takes the mean over sequences.

    Args:
        by: the weight.
    """

    by: Rule

    scope = "batch"

    def __call__(self, t: Tokens) -> Tensor:
        w = self.by(t)
        mean = torch.where(t.valid, w, 0).sum() / t.valid.sum().clamp(min=1)
        return w / torch.where(mean > 1e-8, mean, 1)


@dataclass(frozen=True)
class OffPolicyMask(Parameters):
    """0 for sequences with A < 0 that pi has left: mean log pi_behaviour / pi > delta; else 1.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2, arXiv:2512.02556); TRL ``off_policy_mask_threshold``, slime OPSM.

    Args:
        delta: nats, > 0.
        against: the field with the log-probabilities of the policy that sampled.
    """

    delta: Positive = 0.5
    against: Field = "rollout_logp"

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        kl = t.sequence_mean(getattr(t, self.against) - t.logp)
        return ((t.advantage >= 0) | t.to_tokens(kl <= self.delta)).to(t.logp.dtype)
