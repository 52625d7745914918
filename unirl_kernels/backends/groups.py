"""Named groups of tensors and numbers that operators and backends pass to one another.

Shapes: logits are [B, L, V] with any strides, the last one 1; values per row are [B, L] and contiguous. The packed
layout is B = 1. Statistics, moments and fields are fp32, or fp64 for fp64 logits.

Targets. A row whose target is ``IGNORE`` is not read: its statistics and loss are 0, its gradient is exactly 0, its
argmax is -1. A row whose target is ``ELSEWHERE`` belongs to a shard, and another shard holds the target's column: it is
read, its moments have u_y = -inf, and its gradient has no target column. A row with any other target outside [0, V)
gets NaN everywhere, and argmax -1. If the target's logit is -inf, the log-probability is -inf, and the gradient is the
one that autograd gives log_softmax and gather: d_logp (1 - p_y) = d_logp at the target, -d_logp p_j elsewhere.

A logit of -inf has probability and gradient 0. Always logp <= 0 and H >= 0. A backend whose matmuls take bf16 may ask
for gradients of fp32 logits in bf16; they are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ELSEWHERE = torch.iinfo(torch.int64).min
"""Target of a shard's row if another shard holds the target's column. A user's target is refused on a CPU."""


class ReadoutArgs(NamedTuple):
    """How raw logits x become log-probabilities: z = softcap * tanh(scale * x / softcap) / temperature.

    Kernels use z = kappa u with kappa > 0: u = x, or -x for a negative scale, or tanh(scale x / softcap); kappa =
    |scale| / temperature, or softcap / temperature.
    """

    scale: float
    softcap: float | None
    temperature: float
    row_temperature: Tensor | None  # [B, L]; replaces temperature


class RowStats(NamedTuple):
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]
    lse: Tensor  # [B, L]


class RowMoments(NamedTuple):
    """Sums over a row or a shard of it, relative to its largest u. Statistics and gradients are computed from them, and
    not from lse, whose rounding loses digits."""

    top: Tensor  # [B, L]; m = max_j u_j; -inf if all logits are -inf
    s_minus_1: Tensor  # [B, L]; sum_j e^(kappa (u_j - m)) - 1; -1 if all logits are -inf
    sz: Tensor  # [B, L]; sum_j e^(kappa (u_j - m)) kappa (u_j - m), <= 0
    u_target: Tensor  # [B, L]; u_y; -inf if the target is ELSEWHERE


class Measured(NamedTuple):
    stats: RowStats
    moments: RowMoments


class RowObservations(NamedTuple):
    """Further results of the statistics' sweep, without a gradient."""

    log_sum_sq_probs: Tensor  # [B, L]; log sum_j p_j^2, <= 0
    mean_logit: Tensor  # [B, L]; mean of z_j; -inf if one is -inf
    # Of the raw logits, since z rounds: x_j, or -x_j for a negative scale. NaN and -1 in a row with NaN or inf.
    largest: Tensor  # [B, L]; max_j
    argmax: Tensor  # [B, L] int64; the first column with the largest


class Observed(NamedTuple):
    stats: RowStats
    moments: RowMoments
    observations: RowObservations


Measure = Callable[[Tensor, Tensor, ReadoutArgs], Measured | Observed]
"""``token_stats`` or ``token_observations`` of a backend: what it finds in rows of logits with their targets."""


class RowGradients(NamedTuple):
    """Gradients of the loss with respect to a row's statistics; None is zero."""

    d_logp: Tensor | None  # [B, L]
    d_entropy: Tensor | None  # [B, L]
    d_lse: Tensor | None  # [B, L]


class ProgramArgs(NamedTuple):
    """The scalar program of a loss, and its inputs other than the statistics."""

    text: str  # see ``Program.text``
    fields: Tensor  # [n_fields, B, L] contiguous, in the dtype of the statistics
    params: Tensor  # [n_params] float64


class FusedRows(NamedTuple):
    loss: Tensor  # [B, L], weighted
    logp: Tensor  # [B, L]
    entropy: Tensor  # [B, L]
    lse: Tensor  # [B, L]


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the tensors of values per row: fp32, or fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_like(target: Tensor, dtype: torch.dtype, n: int) -> list[Tensor]:
    """Uninitialised memory for n values of each row, for logits of a dtype."""
    computed = row_dtype(dtype)
    # empty_like takes half the time of torch.empty with a shape and a device.
    return [torch.empty_like(target, dtype=computed, memory_format=torch.contiguous_format) for _ in range(n)]


def measured_like(target: Tensor, dtype: torch.dtype) -> Measured:
    logp, entropy, lse, *moments = rows_like(target, dtype, len(RowStats._fields) + len(RowMoments._fields))
    return Measured(RowStats(logp, entropy, lse), RowMoments._make(moments))


def observed_like(target: Tensor, dtype: torch.dtype) -> Observed:
    values = rows_like(target, dtype, len(RowObservations._fields) - 1)
    observations = RowObservations._make((*values, torch.empty_like(target)))
    return Observed(*measured_like(target, dtype), observations)
