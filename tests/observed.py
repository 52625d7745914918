"""Observations of rows, computed naively, and the comparison of kernels with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.batch import IGNORE
from unirl_kernels.testing.budgets import condition_of, violations


def naive(z: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_j p_j^2 and the mean of z_j of each row, in z's dtype."""
    return torch.logsumexp(2 * torch.log_softmax(z, -1), -1), z.mean(-1)


def check(found: Any, logits: Tensor, target: Tensor, exact_z: Tensor, plain_z: Tensor, scale: float = 1.0) -> None:
    """Assert that the observations are within budget, and the argmax is the first of the largest.

    Args:
        found: has log_sum_sq_probs, mean_logit and argmax; what ignored rows hold is checked, too.
        logits: what was given, [..., V]. z increases with them, or decreases under a negative scale; between those
            that are different fp64 may see no difference after a softcap.
        target: [...], no row's out of the vocabulary.
        exact_z, plain_z: [..., V] after the readout, float64 and as eager PyTorch would have it.
        scale: of the readout.
    """
    used = target != IGNORE
    finite = torch.where(exact_z.isinf(), 0.0, exact_z)
    sizes = (max(1.0, 2 * math.log(logits.shape[-1])), finite.abs().mean(-1).max().item() if used.numel() else 1.0)
    names = ("log_sum_sq_probs", "mean_logit")
    for name, size, plain, truth in zip(names, sizes, naive(plain_z), naive(exact_z), strict=True):
        plain, truth = torch.where(used, plain, 0.0), torch.where(used, truth, 0.0)
        x = getattr(found, name)
        assert x.dtype == plain_z.dtype
        assert not x.requires_grad
        problems = violations(x, plain, truth, condition=condition_of(truth, size))
        assert not problems, f"{name}: {problems}"
    assert (found.log_sum_sq_probs <= 0).all()
    argmax = (-logits if scale < 0 else logits).detach().argmax(-1)
    assert found.argmax.dtype == torch.int64
    assert torch.equal(found.argmax, torch.where(used, argmax, -1)), "argmax"
