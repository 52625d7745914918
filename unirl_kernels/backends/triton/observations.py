"""Statistics of a row and what else shows in the same sweep:

    log sum_j p_j^2 = log s2 - 2 log s,   s2 = sum_j 4^t_j      mean of z_j = factor / V sum_j u_j

with s and t_j as in ``statistics``; and the first of the largest logits. For that the sweep keeps per lane the largest
logit and the tile where it came first; the one tile that is the row's is read again and searched for the column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.scalar_math import LOG2E
from unirl_kernels.backends.triton.statistics import (
    absent,
    combine,
    exponents,
    finish,
    lane_sums,
    rescaled,
    row_factor,
    start_of_row,
    unscaled,
)
from unirl_kernels.backends.triton.tiles import is_below, lane_start, load, within_lane


@triton.jit
def signed(x: tl.tensor, inner: tl.tensor, READOUT: tl.constexpr) -> tl.tensor:
    """x, or -x under a negative scale: z increases with it, and unlike u it keeps any two logits apart."""
    if READOUT == "softcap":
        return tl.where(inner < 0, -x, x)
    elif READOUT == "negated":
        return -x
    else:
        return x


@triton.jit
def observe(
    x: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    inner: tl.tensor,
    rate: tl.tensor,
    top: tl.tensor,
    s: tl.tensor,
    sz: tl.tensor,
    s2: tl.tensor,
    su: tl.tensor,
    peak: tl.tensor,
    place: tl.tensor,
    READOUT: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Add the tile at ``start`` to what is known of each lane."""
    x = x.to(rate.dtype)
    u = unscaled(x, inner, READOUT)
    v = signed(x, inner, READOUT)
    counted = u
    if MASKED:
        below = is_below(size, start, TILE)
        counted = tl.where(below, u, 0.0)
        u = tl.where(below, u, float("-inf"))
        v = tl.where(below, v, float("-inf"))
    su += tl.sum(tl.sum(counted, 2), 0)
    tile_peak = tl.max(tl.max(v, 2), 0)
    place = tl.where(tile_peak > peak, start, place)
    peak = tl.maximum(peak, tile_peak)
    new_top, base, t = exponents(u, top, rate)
    s, sz = rescaled(base, top, s, sz, rate)
    s2, _ = rescaled(base, top, s2, s2, 2.0 * rate)
    e = tl.exp2(t)
    tile_s, tile_sz = lane_sums(t, e)
    return new_top, s + tile_s, sz + tile_sz, s2 + tl.sum(tl.sum(e * e, 2), 0), su, peak, place


@triton.jit
def first_of(
    row: tl.tensor,
    size: tl.tensor,
    inner: tl.tensor,
    peak: tl.tensor,
    place: tl.tensor,
    READOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The row's first column with its largest logit, from the lanes' largest and the tiles where these came first."""
    row_peak = tl.max(peak, 0)
    start = tl.min(tl.where(peak == row_peak, place, size), 0)
    v = signed(load(row, start, size, True, ALIGNED, TILE).to(peak.dtype), inner, READOUT)
    found = is_below(size, start, TILE) & (v == row_peak)
    columns = start + lane_start(TILE) + within_lane(TILE)
    return tl.min(tl.min(tl.min(tl.where(found, columns, size), 2), 0), 0)


@kernel
def observations(
    logits: tl.tensor,  # [B, L, V]
    target: tl.tensor,  # [B, L], as all that follow
    row_temperature: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    lse: tl.tensor,
    log_sum_sq_probs: tl.tensor,
    mean_logit: tl.tensor,
    largest: tl.tensor,
    argmax: tl.tensor,  # int64
    length: tl.int32,
    size: tl.int32,
    stride_b: tl.int64,
    stride_l: tl.int64,
    inner: tl.float64,
    factor: tl.float64,
    READOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program per row, one read."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    row = tl.program_id(0)
    y = tl.load(target + row)
    if (y >= 0) & (y < size):
        f = row_factor(factor, row_temperature, row, COMPUTE)
        rate = f * LOG2E
        k = tl.full((), inner, COMPUTE)
        at = start_of_row(logits, row, length, stride_b, stride_l)
        u_y = unscaled(tl.load(at + y).to(COMPUTE), k, READOUT)
        top = tl.full((TILE.lanes,), float("-inf"), COMPUTE)
        s = tl.full((TILE.lanes,), 0.0, COMPUTE)
        sz, s2, su, peak, place = s, s, s, top, tl.full((TILE.lanes,), 0, tl.int32)
        main = size // COLUMNS * COLUMNS
        for start in range(0, main, COLUMNS):
            x = load(at, start, size, False, ALIGNED, TILE)
            top, s, sz, s2, su, peak, place = observe(x, start, size, k, rate, top, s, sz, s2, su, peak, place,
                                                      READOUT, False, TILE)  # fmt: skip
        if main < size:
            x = load(at, main, size, True, ALIGNED, TILE)
            top, s, sz, s2, su, peak, place = observe(x, main, size, k, rate, top, s, sz, s2, su, peak, place,
                                                      READOUT, True, TILE)  # fmt: skip
        column = first_of(at, size, k, peak, place, READOUT, ALIGNED, TILE)
        _, row_s2, _ = combine(top, s2, s2, 2.0 * rate)
        base, row_s, row_sz = combine(top, s, sz, rate)
        logp_y, h, log_sum = finish(base, row_s, row_sz, u_y, f)
        log_sum_sq = tl.log(row_s2) - 2.0 * tl.log(row_s)
        broken = row_s != row_s
        tl.store(logp + row, logp_y)
        tl.store(entropy + row, h)
        tl.store(lse + row, log_sum)
        tl.store(log_sum_sq_probs + row, tl.where(log_sum_sq > 0, 0.0, log_sum_sq))
        tl.store(mean_logit + row, f * (tl.sum(su, 0) / size))
        tl.store(largest + row, tl.where(broken, float("nan"), tl.max(peak, 0)))
        tl.store(argmax + row, tl.where(broken, -1, column).to(tl.int64))
    else:
        nothing = absent(y, COMPUTE)
        tl.store(logp + row, nothing)
        tl.store(entropy + row, nothing)
        tl.store(lse + row, nothing)
        tl.store(log_sum_sq_probs + row, nothing)
        tl.store(mean_logit + row, nothing)
        tl.store(largest + row, nothing)
        tl.store(argmax + row, tl.full((), -1, tl.int64))
