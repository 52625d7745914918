"""verl's rollout corrections: weights and rejections by the ratio of the policy to the one that sampled."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import IGNORE
from unirl_kernels.integrations.options import Options
from unirl_kernels.objectives import (
    Aggregation,
    IcePop,
    SequenceIcePop,
    SequenceTruncatedRatio,
    TruncatedRatio,
)
from unirl_kernels.objectives.arguments import NonNegative, Parameters
from unirl_kernels.objectives.compose import Rule

BOUND = 20.0
"""Where verl bounds log-ratios of rejections."""

REJECTIONS = (
    *("token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3"),
    *("seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3"),
)


def importance_weight(options: Options) -> Rule | None:
    """The weight of ``rollout_is``; None for none.

    Args:
        options: of a RolloutCorrectionConfig.
    """
    by_sequence = options.choice("rollout_is", {None: None, "token": False, "sequence": True})
    if by_sequence is None:
        return None
    low, high = _bounds_of_weights(options)
    given: dict[str, Any] = {"of": "logp", "against": "old_logp", "high": high}
    rule: Rule
    if low is None:
        rule = (SequenceTruncatedRatio if by_sequence else TruncatedRatio)(**given)
    else:
        rule = (SequenceIcePop if by_sequence else IcePop)(low=low, **given)
    if not options.flag("rollout_is_batch_normalize"):
        return rule
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise options.refused(
            "rollout_is_batch_normalize", "the mean is over all processes, and a loss sees its own; set False"
        )
    return OverMean(rule, by_sequence)


def _bounds_of_weights(options: Options) -> tuple[float | None, float]:
    """The least weight, if any, and the largest: "upper" or "lower_upper"."""
    given = options.get("rollout_is_threshold")
    *lower, upper = _numbers(options, "rollout_is_threshold", str(given), (1, 2))
    return (lower[0] if lower else None), upper


def _numbers(options: Options, name: str, text: str, counts: tuple[int, ...]) -> list[float]:
    """Numbers joined by ``_``: positive, rising, as many as one of the counts."""
    try:
        found = [float(x) for x in text.split("_")]
    except ValueError:
        found = []
    if len(found) not in counts or found != sorted(found) or not all(x > 0 for x in found):
        what = "a positive number" if counts == (1,) else "a positive number, or two as lower_upper"
        raise ValueError(f"{options.title}.{name} must be {what}, got {text!r} in {options.get(name)!r}")
    return found


@dataclass(frozen=True)
class OverMean(Parameters):
    """w / mean(w), the mean over tokens or over the sequences that have any; w itself where the mean is 0.

    Args:
        by: w.
        by_sequence: whether the mean is over sequences.
    """

    by: Rule
    by_sequence: bool

    scope = "batch"

    def __call__(self, t: Any) -> Tensor:
        w = self.by(t)
        if self.by_sequence:
            mean = t.sequence_mean(w).sum() / (t.lengths > 0).sum()
        else:
            mean = torch.where(t.valid, w, 0).sum() / t.valid.sum()
        return torch.where(mean > 1e-8, w / mean, w)


def rejection(options: Options) -> Rejection | None:
    """The rule of ``rollout_rs``; None for none.

    Args:
        options: of a RolloutCorrectionConfig.
    """
    given = options.get("rollout_rs")
    if given is None:
        return None
    if not isinstance(given, str):
        raise TypeError(f"{options.title}.rollout_rs must be names joined by commas, got {given!r}")
    names = list(dict.fromkeys(x.strip() for x in given.split(",") if x.strip()))
    if not names or (unknown := [x for x in names if x not in REJECTIONS]):
        got = unknown[0] if names else given
        raise ValueError(f"{options.title}.rollout_rs must be of {', '.join(REJECTIONS)}, got {got!r}")
    threshold = options.get("rollout_rs_threshold")
    texts = [x.strip() for x in str(threshold).split(",") if x.strip()]
    if threshold is None or len(texts) not in (1, len(names)):
        raise ValueError(
            f"{options.title}.rollout_rs_threshold must have one threshold, or one for each of {', '.join(names)}, "
            f"got {threshold!r}"
        )
    texts = texts * len(names) if len(texts) == 1 else texts
    return Rejection(tuple(_criterion(options, *x) for x in zip(names, texts, strict=True)))


def _criterion(options: Options, name: str, text: str) -> Criterion:
    if name.endswith("k1"):
        *lower, upper = _numbers(options, "rollout_rs_threshold", text, (1, 2))
        return Criterion(name, math.log(lower[0] if lower else 1 / upper), math.log(upper))
    (upper,) = _numbers(options, "rollout_rs_threshold", text, (1,))
    return Criterion(name, -math.inf, upper)


@dataclass(frozen=True)
class Criterion(Parameters):
    """Whether an estimate of the divergence lies between two bounds: of a token, or of its sequence.

    Args:
        name: verl's, such as ``seq_mean_k3``.
        low, high: the bounds, nats.
    """

    name: str
    low: float
    high: float

    def __call__(self, t: Any) -> Tensor:
        log_ratio = (t.logp.detach() - t.old_logp).clamp(-BOUND, BOUND)
        estimates = {
            "k1": lambda: -log_ratio,
            "k2": lambda: 0.5 * torch.square(log_ratio),
            "k3": lambda: torch.expm1(log_ratio) - log_ratio,
        }
        level, _, kind = self.name.rpartition("_")
        x = estimates[kind]()
        if level != "token":
            of_sequences = {"seq_sum": t.sequence_sum, "seq_mean": t.sequence_mean, "seq_max": _maximum(t)}
            x = t.to_tokens(of_sequences[level](x))
        return (x >= self.low) & (x <= self.high)


def _maximum(t: Any) -> Any:
    """Largest of [T] values of each sequence, [S]; 0 where it has no tokens."""

    def maximum(x: Tensor) -> Tensor:
        sequence = torch.arange(t.n_sequences, device=x.device)
        inside = (t.to_tokens(sequence) == sequence.unsqueeze(-1)) & t.valid
        largest = torch.where(inside, x, -torch.inf).amax(-1)
        return torch.where(t.lengths > 0, largest, 0)

    return maximum


@dataclass(frozen=True)
class Rejection:
    """The tokens that pass all criteria, [T] bool.

    Args:
        criteria: the criteria.
    """

    criteria: tuple[Criterion, ...]

    scope = "batch"

    def __call__(self, t: Any) -> Tensor:
        kept: Tensor = t.valid
        for criterion in self.criteria:
            kept = kept & criterion(t)
        return kept


@dataclass(frozen=True)
class Kept(Parameters):
    """What the weights of an aggregation become when rejected tokens do not count, by what they were.

    Args:
        rejection: the rule.
        aggregation: the aggregation.
    """

    rejection: Rejection
    aggregation: Aggregation

    scope = "batch"

    def __call__(self, t: Any) -> Tensor:
        batch = t._batch
        target = torch.where(self.rejection(t).view(batch.target.shape), batch.target, IGNORE)
        left = self.aggregation.weights(dataclasses.replace(batch, target=target))
        factor = torch.where(left == 0, 0, left / self.aggregation.weights(batch))
        return factor.reshape(-1).to(t.logp.dtype)


@dataclass(frozen=True)
class GeometricMean(Parameters):
    """The geometric mean of a sequence's weights, at each of its tokens.

    Args:
        by: the weight of a token.
        least: added to it, >= 0.
    """

    by: Rule
    least: NonNegative = 1e-10

    scope = "sequence"

    def __call__(self, t: Any) -> Tensor:
        return t.to_tokens(torch.exp(t.sequence_mean(torch.log(self.by(t) + self.least))))  # type: ignore[no-any-return]
