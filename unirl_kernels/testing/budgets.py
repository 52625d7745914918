"""The error budget: a kernel may err twice as much as plain PyTorch does on the same input, plus a few ulp.

All errors are measured against fp64. Besides the largest error, a budget holds the relative L2 error and the signed
bias, so that a small systematic error cannot hide under an elementwise bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """How far values are from the truth.

    Args:
        largest: max |x - truth|.
        relative: ||x - truth|| / ||truth||, Euclidean; 0 where both are 0.
        bias: sum of (x - truth) sign(truth) / sum |truth|; negative when x is too small in magnitude.
    """

    largest: float
    relative: float
    bias: float


def error(x: Tensor, truth: Tensor) -> Error:
    """The error of ``x``, any floating dtype, against ``truth``, float64 of the same shape.

    Raises:
        ValueError: when the shapes differ, or where one is infinite or NaN and the other is not the same.
    """
    if x.shape != truth.shape:
        raise ValueError(f"x must have shape {tuple(truth.shape)}, got {tuple(x.shape)}")
    x, truth = x.double(), truth.double()
    finite = torch.isfinite(x) & torch.isfinite(truth)
    same = (x == truth) | (x.isnan() & truth.isnan())
    if not bool((finite | same).all()):
        at = tuple((~(finite | same)).nonzero()[0].tolist())
        raise ValueError(f"x must be {truth[at].item()} at {at} like the truth, got {x[at].item()}")
    difference = x - truth
    if not bool(finite.all()):  # picking single elements out of a large tensor is slow
        difference, truth = difference[finite], truth[finite]
    if not truth.numel():
        return Error(0.0, 0.0, 0.0)
    largest = difference.abs().max().item()
    if largest == 0:
        return Error(0.0, 0.0, 0.0)
    norm, mass = truth.norm().item(), truth.abs().sum().item()
    infinite = float("inf")
    return Error(
        largest,
        difference.norm().item() / norm if norm else infinite,
        (difference * truth.sign()).sum().item() / mass if mass else infinite,
    )


def condition_of(truth: Tensor, scale: float = 1.0) -> float:
    """How much larger than a result the values are that it is computed from, at least 1.

    Args:
        truth: the result, float64.
        scale: size of the intermediate values; for a log-probability |lse|, of which the target's logit is subtracted.

    Returns:
        What ``budget`` and ``violations`` take as ``condition``.
    """
    return max(1.0, scale / max(_peak(truth), 1e-30))


def _peak(truth: Tensor) -> float:
    """max |truth| where it is finite; 0 where it never is."""
    finite = truth[torch.isfinite(truth)]
    return finite.abs().max().item() if len(finite) else 0.0


def budget(plain: Tensor, truth: Tensor, *, ulps: float = 8.0, condition: float = 1.0) -> Error:
    """The error allowed: twice that of ``plain``, and ``ulps`` units of rounding.

    Args:
        plain: what eager PyTorch computes; its dtype is the result's dtype.
        truth: float64, the same shape.
        ulps: units of rounding that pass in any case (``plain`` may be lucky).
        condition: factor from rounding of an intermediate value to an error of the result, >= 1; see ``condition_of``.
    """
    reached = error(plain, truth)
    rounding = ulps * torch.finfo(plain.dtype).eps * max(1.0, condition)
    return Error(
        2 * reached.largest + rounding * _peak(truth), 2 * reached.relative + rounding, 2 * abs(reached.bias) + rounding
    )


def violations(x: Tensor, plain: Tensor, truth: Tensor, *, ulps: float = 8.0, condition: float = 1.0) -> list[str]:
    """What in ``x`` exceeds its budget, in words; empty when nothing does. Arguments as for ``budget``."""
    try:
        reached = error(x, truth)
    except ValueError as mismatch:
        return [str(mismatch)]
    allowed = budget(plain, truth, ulps=ulps, condition=condition)
    names = [field.name for field in fields(Error)]
    pairs = [(name, abs(getattr(reached, name)), getattr(allowed, name)) for name in names]
    return [f"{name} error {got:.3g} exceeds {limit:.3g}" for name, got, limit in pairs if not got <= limit]
