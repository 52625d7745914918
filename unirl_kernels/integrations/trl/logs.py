"""What TRL's trainers log of their losses, under its names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.integrations.rules import WithField
from unirl_kernels.objectives import Objective
from unirl_kernels.objectives.arguments import AboveOne, NonNegative, Parameters, Positive, Share
from unirl_kernels.objectives.ratios import ratio
from unirl_kernels.objectives.scores import Score


def sequence_advantage(t: Any) -> Tensor:
    """The advantage of each sequence, [S]; the mean of its tokens' where it was given by token."""
    try:
        return t.sequence_field("advantage")  # type: ignore[no-any-return]
    except ValueError:
        return t.sequence_mean(t.advantage)  # type: ignore[no-any-return]


def sequence_means(t: Any, values: Tensor, empty: float) -> Tensor:
    """Mean of [T] values over each sequence, [S], and ``empty`` where it has no tokens."""
    return torch.where(t.lengths > 0, t.sequence_mean(values), empty)


@dataclass(frozen=True)
class NoLog(Parameters):
    """Logs nothing."""

    def __call__(self, t: Any) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Value(Parameters):
    """Logs an objective's own values.

    Args:
        name: of the metric.
        objective: the objective.
    """

    name: str
    objective: Objective

    def __call__(self, t: Any) -> dict[str, Any]:
        return {self.name: self.objective(t)}


@dataclass(frozen=True)
class TokenClips(Parameters):
    """``clip_ratio/...`` of the ratios of tokens.

    Args:
        low, high, delta: as in ``TwoSidedClip``.
    """

    low: Share
    high: NonNegative
    delta: AboveOne | None = None

    def __call__(self, t: Any) -> dict[str, Any]:
        r = ratio(t.logp - t.old_logp)
        below, above = clipped_sides(r, t.advantage, self)
        return {
            "clip_ratio/low_mean": below,
            "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below + above,
            "clip_ratio/low_min": sequence_means(t, below, math.inf).min(),
            "clip_ratio/high_max": sequence_means(t, above, -math.inf).max(),
        }


def clipped_sides(r: Tensor, advantage: Tensor, clip: Any) -> tuple[Tensor, Tensor]:
    """1 where the clip removes the gradient, else 0: below and above."""
    r = r if clip.delta is None else r.clamp(max=clip.delta)
    below, above = (r < 1 - clip.low) & (advantage < 0), (r > 1 + clip.high) & (advantage > 0)
    return below.to(r.dtype), above.to(r.dtype)


@dataclass(frozen=True)
class SequenceClips(Parameters):
    """``clip_ratio/...`` of the ratios of sequences.

    Args:
        low, high, delta: as in ``SequenceTwoSidedClip``.
        summed: whether the ratio is that of the whole sequence; else its geometric mean.
    """

    low: Share
    high: NonNegative
    delta: AboveOne | None = None
    summed: bool = False

    def __call__(self, t: Any) -> dict[str, Any]:
        log_ratio = t.logp - t.old_logp
        r = ratio(t.sequence_sum(log_ratio) if self.summed else t.sequence_mean(log_ratio))
        below, above = clipped_sides(r, sequence_advantage(t), self)
        return {
            "clip_ratio/low_mean": below,
            "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below + above,
            "clip_ratio/low_min": below.min(),
            "clip_ratio/high_max": above.max(),
        }


@dataclass(frozen=True)
class CISPOLog(Parameters):
    """``cispo_clip_ratio``.

    Args:
        upper: as in ``CISPO``.
        by_sequence: whether ratios are of sequences.
    """

    upper: NonNegative
    by_sequence: bool

    def __call__(self, t: Any) -> dict[str, Any]:
        log_ratio, advantage = t.logp - t.old_logp, t.advantage
        if self.by_sequence:
            log_ratio, advantage = t.sequence_mean(log_ratio), sequence_advantage(t)
        above = (ratio(log_ratio) > self.upper) & (advantage > 0)
        return {"cispo_clip_ratio": above.to(log_ratio.dtype)}


@dataclass(frozen=True)
class VESPOLog(Parameters):
    """``vespo/phi_seq_mean``.

    Args:
        objective: ``VESPO``, or one with a field for it.
    """

    objective: Objective

    def __call__(self, t: Any) -> dict[str, Any]:
        if isinstance(self.objective, WithField):
            vespo, t = self.objective.objective, self.objective.with_field(t)
        else:
            vespo = self.objective
        phi: Any = vespo.metrics(t)["phi"]
        return {"vespo/phi_seq_mean": sequence_means(t, phi, 1.0)}


@dataclass(frozen=True)
class PairLog(Parameters):
    """``rewards/...`` and ``logps/...`` of pairs.

    Args:
        beta: of the rewards.
        score: the log-ratio that rewards are of.
        logp: the log-probability of a sequence.
    """

    beta: Positive
    score: Score
    logp: Score

    def __call__(self, t: Any) -> dict[str, Any]:
        chosen, rejected = t.pairs(self.beta * self.score(t))
        logp_chosen, logp_rejected = t.pairs(self.logp(t))
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": logp_chosen,
            "logps/rejected": logp_rejected,
        }


@dataclass(frozen=True)
class JudgedLog(Parameters):
    """``rewards/...`` and ``logps/...`` of judged sequences, and ``kl``.

    Args:
        beta: of the rewards.
        score: the log-ratio that rewards are of.
        with_kl: whether the loss reads the field ``kl``.
    """

    beta: Positive
    score: Score
    with_kl: bool

    def __call__(self, t: Any) -> dict[str, Any]:
        reward, logp = self.beta * self.score(t), t.sequence_sum(t.logp)
        good = t.sequence_field("label") != 0
        means = [torch.where(of, reward, 0).sum() / of.sum() for of in (good, ~good)]
        kl = t.sequence_field("kl").clamp(min=0) if self.with_kl else torch.zeros_like(reward)
        return {
            "rewards/chosen": (reward, good),
            "rewards/rejected": (reward, ~good),
            "rewards/margins": means[0] - means[1],
            "logps/chosen": (logp, good),
            "logps/rejected": (logp, ~good),
            "kl": kl,
        }
