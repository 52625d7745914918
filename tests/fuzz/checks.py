"""Compares results with the truth, element by element."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz.yardstick import ULPS, difference


@dataclass
class Findings:
    """What is wrong with a case.

    Args:
        problems: in words; empty if nothing is.
        compared: elements that were held against the truth.
        undecided: elements that eager PyTorch gets as wrong as can be, or that lie on a kink: nothing is asked of them.
    """

    problems: list[str] = field(default_factory=list)
    compared: int = 0
    undecided: int = 0

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def close(self, name: str, x: Tensor, truth: Tensor, allowed: Tensor) -> None:
        """Check that the error of every element of ``x`` is at most the allowed one."""
        if x.shape != truth.shape:
            self.problems.append(f"{name} must have shape {tuple(truth.shape)}, got {tuple(x.shape)}")
            return
        if not x.numel():
            return
        apart, allowed = difference(x, truth), torch.broadcast_to(allowed, truth.shape)
        self.compared += x.numel()
        self.undecided += int((allowed == torch.inf).sum())
        wrong = ~(apart <= allowed)
        if bool(wrong.any()):
            worst = torch.where(wrong, apart / allowed.clamp(min=1e-300), 0).nan_to_num(torch.inf).argmax()
            at = tuple(int(k) for k in torch.unravel_index(worst, x.shape))
            self.problems.append(
                f"{name} errs at {int(wrong.sum())} of {wrong.numel()} elements; at {at} {x[at].item():.9g}, "
                f"true {truth[at].item():.9g}, off {apart[at].item():.3g}, allowed {allowed[at].item():.3g}"
            )

    def same(self, name: str, x: Tensor, y: Tensor) -> None:
        """Check that both have the same bits; NaN equals NaN."""
        if x.shape != y.shape or x.dtype != y.dtype:
            self.problems.append(f"{name}: {x.dtype}{tuple(x.shape)} is not {y.dtype}{tuple(y.shape)}")
            return
        different = ~((x == y) | (x.isnan() & y.isnan()))
        if bool(different.any()):
            at = tuple(different.nonzero()[0].tolist())
            self.problems.append(
                f"{name} has other bits at {int(different.sum())} of {different.numel()} elements; at {at} "
                f"{x[at].item():.9g} and {y[at].item():.9g}"
            )


def stored(allowed: Tensor, truth: Tensor, dtype: torch.dtype, roundings: int = 1, factor: float = 1.0) -> Tensor:
    """What is allowed of a value that is rounded to ``dtype``, once or again after a factor multiplied it.

    Where the truth is beyond the largest number of ``dtype``, or rounds to infinity, nothing is asked.
    """
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps
    rounding = roundings * limits.eps / 2 * (truth.abs() + allowed)
    allowed = allowed + rounding + least * max(1.0, abs(factor))
    return torch.where(allowed.isnan() | (truth.abs() * (1 + limits.eps) > limits.max), torch.inf, allowed)


def combined(
    weights: Tensor, weights_allowed: Tensor, basis: Tensor, basis_allowed: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows sum_k w_k B_k, and what they may err.

    Args:
        weights: [3, T], of each basis; may be infinite or NaN.
        weights_allowed: [3, T].
        basis: [3, T, V].
        basis_allowed: [3, T].
        eps: of the rows' dtype.

    Returns:
        [T, V] each.
    """
    w, dw = weights.unsqueeze(-1), weights_allowed.unsqueeze(-1)
    parts = w * basis
    size = parts.abs().sum(0).amax(-1, keepdim=True) if basis.shape[-1] else parts.abs().sum(0)
    of_weights = torch.where(dw == 0, 0.0, dw * basis.abs())
    reach = w.abs() + dw
    of_basis = torch.where(reach == 0, 0.0, reach * basis_allowed.unsqueeze(-1))
    allowed = (of_weights + of_basis).sum(0) + ULPS * eps * size
    # What is not asked of a coefficient is not asked of its row, even where the basis is 0.
    return parts.sum(0), torch.where((dw == torch.inf).any(0) | allowed.isnan(), torch.inf, allowed)
