"""Moments of a row: shards and tiles of a row exchange them, and the statistics are computed from them.

With z = kappa u, and sums over the columns j of a shard relative to its own m = max_j u_j,

    s = sum_j e^(kappa (u_j - m))        sz = sum_j e^(kappa (u_j - m)) kappa (u_j - m)

Merging two shards a and b, m = max(m_a, m_b), w = e^(kappa (m_shard - m)):

    s = w_a s_a + w_b s_b        sz = sum over a, b of w (sz + s kappa (m_shard - m))        u_y = max(u_y_a, u_y_b)

For large logits a rounded lse loses digits of the log-probabilities. Moments do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.backends.groups import ELSEWHERE, ReadoutArgs, RowMoments, RowObservations, RowStats
from unirl_kernels.batch import IGNORE


def target_in(target: Tensor, columns: range, vocab: int) -> Tensor:
    """Targets for a shard with these columns: ELSEWHERE for columns of other shards; invalid targets stay invalid."""
    inside = (target >= columns.start) & (target < columns.stop)
    elsewhere = (target >= 0) & (target < vocab)
    outside = torch.where(elsewhere, ELSEWHERE, torch.where(target == IGNORE, IGNORE, -1))
    return torch.where(inside, target - columns.start, outside)


def kappa_of(readout: ReadoutArgs, like: Tensor) -> Tensor:
    """dz/du of a readout, [] or the shape of its row temperature, with the dtype and device of ``like``."""
    size = abs(readout.scale) if readout.softcap is None else readout.softcap
    if readout.row_temperature is None:
        return like.new_tensor(size / readout.temperature)
    return size / readout.row_temperature.to(like.dtype)


def statistics(moments: RowMoments, kappa: Tensor) -> RowStats:
    """Statistics of the rows with these moments.

        logp = kappa (u_y - m) - log s        H = log s - sz / s        lse = kappa m + log s

    Args:
        moments: of whole rows.
        kappa: [] or [B, L], dz/du.

    Returns:
        ``RowStats`` of the moments' dtype, logp <= 0 and H >= 0. NaN for a row without a finite logit; its lse is -inf.
    """
    log_s = torch.log1p(moments.s_minus_1)
    empty = moments.top == -torch.inf
    logp = ((moments.u_target - moments.top) * kappa - log_s).clamp(max=0)
    entropy = (log_s - moments.sz / (1 + moments.s_minus_1)).clamp(min=0)
    lse = torch.where(empty, -torch.inf, moments.top * kappa + log_s)
    return RowStats(logp, entropy, lse)


def merge(parts: RowMoments, kappa: Tensor) -> RowMoments:
    """Moments of rows from those of their shards, in fp64 and in the order of the shards.

    Args:
        parts: [n, ...] each, the shards of every row along the first dimension.
        kappa: [] or [...], dz/du.

    Returns:
        ``RowMoments`` [...] of the parts' dtype.
    """
    top = parts.top.amax(0)
    reference = torch.where(top == -torch.inf, 0, top).double()
    # A shard with only -inf has s = 0 and no finite maximum.
    shift = torch.where(parts.top == -torch.inf, 0, (parts.top.double() - reference) * kappa.double())
    weight = shift.exp()
    s = weight * (1 + parts.s_minus_1.double())
    sz = weight * parts.sz.double() + s * shift
    # One of the shards with the maximum has weight 1. Its s - 1 keeps the digits that s would round away.
    first = (parts.top == top).to(torch.int8).argmax(0, keepdim=True)
    s_minus_1 = s.scatter(0, first, parts.s_minus_1.double().gather(0, first)).sum(0)
    u_target = parts.u_target.amax(0)
    dtype = parts.top.dtype
    return RowMoments(top, s_minus_1.to(dtype), sz.sum(0).to(dtype), u_target)


def placed(shard: RowObservations, start: int, share: float) -> RowObservations:
    """Observations of a shard in the form that ``merge_observations`` takes.

    Args:
        shard: of its own columns.
        start: its first column.
        share: the shard's part of the vocabulary.
    """
    return shard._replace(mean_logit=shard.mean_logit * share, argmax=shard.argmax + start)


def merge_observations(parts: RowObservations, moments: RowMoments, row: RowMoments, kappa: Tensor) -> RowObservations:
    """Observations of rows from those of their shards. w is the probability of a shard:

        log sum p^2 = log sum_shards w^2 e^l        mean = sum_shards mean

    and the argmax of the first shard with the largest logit.

    Args:
        parts: [n, ...] each, ``placed`` and in the order of the shards.
        moments: [n, ...] each, of the shards.
        row: [...] each, merged.
        kappa: [] or [...], dz/du.
    """
    log_w = torch.log1p(moments.s_minus_1) - torch.log1p(row.s_minus_1) + (moments.top - row.top) * kappa
    log_w = torch.where(moments.s_minus_1 == -1, -torch.inf, log_w)
    squares = torch.where(log_w == -torch.inf, -torch.inf, parts.log_sum_sq_probs + 2 * log_w)
    largest = parts.largest.amax(0)
    first = (parts.largest == largest).to(torch.int8).argmax(0, keepdim=True)
    argmax = parts.argmax.gather(0, first).squeeze(0)
    return RowObservations(
        torch.logsumexp(squares, 0).clamp(max=0),
        parts.mean_logit.sum(0),
        largest,
        torch.where(largest.isnan(), -1, argmax),
    )
