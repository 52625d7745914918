"""Moments of a row and its observations, in one sweep:

    log sum_j p_j^2 = log s2 - 2 log s,   s2 = sum_j 4^t_j      mean of z_j = kappa / V sum_j u_j

with s and t_j as in ``statistics``, and the first column of the largest logit. For the latter, the sweep keeps in each
lane the largest logit and the first tile that has it. The first of these tiles with the row's largest logit is then
read again and searched for the column.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from unirl_kernels.backends.groups import RowMoments, RowObservations
from unirl_kernels.backends.triton.rows import Readout, Row, u_of
from unirl_kernels.backends.triton.scalar_math import log1p, minimum
from unirl_kernels.backends.triton.statistics import (
    Sums,
    exponents,
    finite_base,
    lane_sums,
    no_sums,
    rescaled,
    sum_minus_1,
)
from unirl_kernels.backends.triton.tiles import is_below, lane_start, load, within_lane


class Seen(NamedTuple):
    """The sums and maxima of each lane over the part of the row that was read."""

    sums: Sums
    s2: tl.tensor  # relative to sums.top
    su: tl.tensor
    largest: tl.tensor  # logit, see ``signed``
    tile: tl.tensor  # start of the first tile that has it


@triton.jit
def signed(x: tl.tensor, readout: Readout, READOUT: tl.constexpr) -> tl.tensor:
    """x, or -x for a negative scale. z increases with it, and unlike u it never rounds two logits to one value."""
    if READOUT == "softcap":
        return tl.where(readout.inner < 0, -x, x)
    elif READOUT == "negated":
        return -x
    else:
        return x


@triton.jit
def observe(
    seen: Seen,
    row: Row,
    start: tl.tensor,
    readout: Readout,
    READOUT: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
) -> Seen:
    """Add the tile at ``start`` to the sums and maxima of each lane."""
    x = load(row.x, start, row.size, MASKED, TILE).to(readout.rate.dtype)
    u = u_of(x, readout, READOUT)
    v = signed(x, readout, READOUT)
    counted = u
    if MASKED:
        below = is_below(row.size, start, TILE)
        counted = tl.where(below, u, 0.0)
        u = tl.where(below, u, float("-inf"))
        v = tl.where(below, v, float("-inf"))
    su = seen.su + tl.sum(tl.sum(counted, 2), 0)
    largest = tl.max(tl.max(v, 2), 0)
    tile = tl.where(largest > seen.largest, start, seen.tile)
    top, base, t = exponents(u, seen.sums.top, readout.rate)
    s, sz = rescaled(base, seen.sums, readout.rate)
    s2, _ = rescaled(base, Sums(seen.sums.top, seen.s2, seen.s2), 2.0 * readout.rate)
    e = tl.exp2(t)
    tile_s, tile_sz = lane_sums(t, e)
    s2 += tl.sum(tl.sum(e * e, 2), 0)
    return Seen(Sums(top, s + tile_s, sz + tile_sz), s2, su, tl.maximum(seen.largest, largest), tile)


@triton.jit
def observe_row(row: Row, readout: Readout, READOUT: tl.constexpr, TILE: tl.constexpr) -> Seen:
    """One sweep of the row."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    sums = no_sums(TILE.lanes, readout.rate.dtype)
    seen = Seen(sums, sums.s, sums.s, sums.top, tl.full((TILE.lanes,), 0, tl.int32))
    main = row.size // COLUMNS * COLUMNS
    for start in range(0, main, COLUMNS):
        seen = observe(seen, row, start, readout, READOUT, False, TILE)
    if main < row.size:
        seen = observe(seen, row, main, readout, READOUT, True, TILE)
    return seen


@triton.jit
def first_of(seen: Seen, row: Row, readout: Readout, READOUT: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """The first column with the row's largest logit, from the lanes' largest logits and their first tiles."""
    largest = tl.max(seen.largest, 0)
    start = tl.min(tl.where(seen.largest == largest, seen.tile, row.size), 0)
    v = signed(load(row.x, start, row.size, True, TILE).to(readout.rate.dtype), readout, READOUT)
    found = is_below(row.size, start, TILE) & (v == largest)
    columns = start + lane_start(TILE) + within_lane(TILE)
    return tl.min(tl.min(tl.min(tl.where(found, columns, row.size), 2), 0), 0)


@triton.jit
def log_sum_of_squares(seen: Seen, s_minus_1: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """log sum_j p_j^2 of a row, <= 0."""
    squares = Sums(seen.sums.top, seen.s2, seen.s2)
    base = finite_base(tl.max(squares.top, 0))
    s2, _ = rescaled(base, squares, 2.0 * rate)
    return minimum(log1p(sum_minus_1(s2)) - 2.0 * log1p(s_minus_1), 0.0)


@triton.jit
def observations_of(
    seen: Seen, column: tl.tensor, moments: RowMoments, readout: Readout, size: tl.tensor
) -> RowObservations:
    """Observations of a row of ``size`` columns. ``column`` is the first column with the largest logit."""
    broken = moments.s_minus_1 != moments.s_minus_1
    return RowObservations(
        log_sum_of_squares(seen, moments.s_minus_1, readout.rate),
        readout.kappa * (tl.sum(seen.su, 0) / size),
        tl.where(broken, float("nan"), tl.max(seen.largest, 0)),
        tl.where(broken, -1, column).to(tl.int64),
    )
