"""Moments of a row in one sweep, and its statistics: log-sum-exp, entropy, and the target's log-probability.

u is the logit before the temperature (with a softcap, its tanh), and z = kappa u:

    s = sum_j 2^t_j      sz = sum_j 2^t_j t_j      t_j = (u_j - max u) kappa log2(e)
    lse = kappa max u + log s      H = log s - log(2) sz / s      logp = kappa (u_y - max u) - log s

No sum cancels: all sums are relative to the maximum, and t_j is exact near it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from unirl_kernels.backends.groups import RowMoments, RowStats
from unirl_kernels.backends.triton.rows import Readout, Row, u_of, u_of_target
from unirl_kernels.backends.triton.scalar_math import LN2, log1p, maximum, minimum
from unirl_kernels.backends.triton.tiles import is_below, load

FLOOR = tl.constexpr(-1e4)
"""Replaces an exponent of -inf, since 0 * -inf is NaN. 2^FLOOR is 0, in fp64 too."""


class Sums(NamedTuple):
    """Sums of a lane, of a slice, or of a row."""

    top: tl.tensor  # max u; -inf if all u are
    s: tl.tensor  # relative to top, like sz
    sz: tl.tensor


@triton.jit
def finite_base(top: tl.tensor) -> tl.tensor:
    """The reference of u: its maximum, or 0 if all u are -inf and the difference would be NaN."""
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def rescaled(base: tl.tensor, sums: Sums, rate: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """s and sz, relative to ``base``."""
    shift = tl.maximum((sums.top - base) * rate, FLOOR)
    keep = tl.exp2(shift)
    return keep * sums.s, keep * (sums.sz + shift * sums.s)


@triton.jit
def lane_sums(t: tl.tensor, e: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """s and sz of each lane, [LANES], of a tile with exponents t and e = 2^t."""
    return tl.sum(tl.sum(e, 2), 0), tl.sum(tl.sum(e * tl.maximum(t, FLOOR), 2), 0)


@triton.jit
def exponents(u: tl.tensor, top: tl.tensor, rate: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The new maximum of each lane, its finite base, and the exponents of the tile."""
    new_top = tl.maximum(top, tl.max(tl.max(u, 2), 0))
    base = finite_base(new_top)
    return new_top, base, (u - base[None, :, None]) * rate


@triton.jit
def no_sums(LANES: tl.constexpr, COMPUTE: tl.constexpr) -> Sums:
    """The sums of lanes before the first tile."""
    zero = tl.full((LANES,), 0.0, COMPUTE)
    return Sums(tl.full((LANES,), float("-inf"), COMPUTE), zero, zero)


@triton.jit
def accumulate(u: tl.tensor, sums: Sums, rate: tl.tensor) -> Sums:
    """Add a tile to the sums of each lane. One maximum and one rescaling per lane and tile, not per element."""
    top, base, t = exponents(u, sums.top, rate)
    s, sz = rescaled(base, sums, rate)
    tile_s, tile_sz = lane_sums(t, tl.exp2(t))
    return Sums(top, s + tile_s, sz + tile_sz)


@triton.jit
def sum_minus_1(s: tl.tensor) -> tl.tensor:
    """Sum over lanes of s, minus the 1 of the row's largest logit.

    If one logit has nearly all of the probability, adding to its 1 would lose the sum of the others. So the integer
    parts and the fractions of the lanes are added separately.
    """
    ones = tl.floor(s)
    return tl.sum(s - ones, 0) + (tl.sum(ones, 0) - 1.0)


@triton.jit
def combine(sums: Sums, u_target: tl.tensor, rate: tl.tensor) -> RowMoments:
    """Moments of a row from the sums of its lanes."""
    top = tl.max(sums.top, 0)
    s, sz = rescaled(finite_base(top), sums, rate)
    return RowMoments(top, sum_minus_1(s), tl.sum(sz, 0) * LN2, u_target)


@triton.jit
def masked(row: Row, start: tl.tensor, readout: Readout, READOUT: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """u of a tile; -inf beyond the row."""
    COMPUTE: tl.constexpr = readout.rate.dtype
    if TILE.aligned and READOUT != "softcap":
        # The load itself writes the infinity, which saves a select per element.
        OUTSIDE: tl.constexpr = float("inf") if READOUT == "negated" else float("-inf")
        x = load(row.x, start, row.size, True, TILE, OUTSIDE)
        return u_of(x.to(COMPUTE), readout, READOUT)
    else:
        x = load(row.x, start, row.size, True, TILE)
        u = u_of(x.to(COMPUTE), readout, READOUT)
        return tl.where(is_below(row.size, start, TILE), u, float("-inf"))


@triton.jit
def sweep(row: Row, readout: Readout, READOUT: tl.constexpr, TILE: tl.constexpr) -> RowMoments:
    """Moments of a row."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    COMPUTE: tl.constexpr = readout.rate.dtype
    u_target = u_of_target(row, readout, READOUT)
    sums = no_sums(TILE.lanes, COMPUTE)
    main = row.size // COLUMNS * COLUMNS
    for start in range(0, main, COLUMNS):
        x = load(row.x, start, row.size, False, TILE)
        sums = accumulate(u_of(x.to(COMPUTE), readout, READOUT), sums, readout.rate)
    if main < row.size:
        sums = accumulate(masked(row, main, readout, READOUT, TILE), sums, readout.rate)
    return combine(sums, u_target, readout.rate)


@triton.jit
def statistics_of(moments: RowMoments, readout: Readout) -> RowStats:
    """Statistics of a row. The bounds logp <= 0 and H >= 0 hold even if tanh rounds differently than in the sweep."""
    log_s = log1p(moments.s_minus_1)
    base = finite_base(moments.top)
    logp = (moments.u_target - base) * readout.kappa - log_s
    entropy = log_s - moments.sz / (1.0 + moments.s_minus_1)
    return RowStats(minimum(logp, 0.0), maximum(entropy, 0.0), base * readout.kappa + log_s)
