"""The error budget: the error of a kernel may be twice that of plain PyTorch on the same input, plus a few ulp.

All errors are relative to fp64. Besides the largest error, a budget bounds the relative L2 error and the signed bias,
so that it detects a small systematic error below the elementwise bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """The difference between values and the truth.

    Args:
        largest: max |x - truth|.
        relative: ||x - truth|| / ||truth||, Euclidean; 0 if both are 0.
        bias: sum of (x - truth) sign(truth) / sum |truth|; negative when x is too small in magnitude.
    """

    largest: float
    relative: float
    bias: float


def error(x: Tensor, truth: Tensor) -> Error:
    """The error of ``x``, any floating dtype, against ``truth``, float64 of the same shape.

    Raises:
        ValueError: when the shapes differ, or when an element is infinite or NaN in only one of them.
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
    """The size of the intermediate values relative to the result, at least 1.

    Args:
        truth: the result, float64.
        scale: size of the intermediate values; for a log-probability |lse|, which is subtracted from the target's
            logit.

    Returns:
        The argument ``condition`` of ``budget`` and ``violations``.
    """
    return max(1.0, scale / max(_peak(truth), 1e-30))


def _peak(truth: Tensor) -> float:
    """max |truth| over finite elements; 0 if there are none."""
    finite = truth[torch.isfinite(truth)]
    return finite.abs().max().item() if len(finite) else 0.0


def budget(plain: Tensor, truth: Tensor, *, ulps: float = 8.0, condition: float = 1.0) -> Error:
    """The allowed error: twice that of ``plain``, plus ``ulps`` units of rounding.

    Args:
        plain: the result of eager PyTorch; its dtype is the result's dtype.
        truth: float64, the same shape.
        ulps: units of rounding that are always allowed, since the error of ``plain`` may be small by chance.
        condition: factor from rounding of an intermediate value to an error of the result, >= 1; see ``condition_of``.
    """
    reached = error(plain, truth)
    rounding = ulps * torch.finfo(plain.dtype).eps * max(1.0, condition)
    return Error(
        2 * reached.largest + rounding * _peak(truth), 2 * reached.relative + rounding, 2 * abs(reached.bias) + rounding
    )


def violations(x: Tensor, plain: Tensor, truth: Tensor, *, ulps: float = 8.0, condition: float = 1.0) -> list[str]:
    """The errors of ``x`` that exceed the budget, as text; empty if none does. Arguments as for ``budget``."""
    try:
        reached = error(x, truth)
    except ValueError as mismatch:
        return [str(mismatch)]
    allowed = budget(plain, truth, ulps=ulps, condition=condition)
    names = [field.name for field in fields(Error)]
    pairs = [(name, abs(getattr(reached, name)), getattr(allowed, name)) for name in names]
    return [f"{name} error {got:.3g} exceeds {limit:.3g}" for name, got, limit in pairs if not got <= limit]
