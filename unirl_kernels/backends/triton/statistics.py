"""Statistics of a row in one sweep: log-sum-exp, entropy, and the target's log-probability.

With u the row before temperature (the logit, or its tanh under a softcap) and z = factor u:

    s = sum_j 2^t_j      sz = sum_j 2^t_j t_j      t_j = (u_j - max u) factor log2(e)
    lse = factor max u + log s      H = log s - log(2) sz / s      logp = factor (u_y - max u) - log s

No sum cancels: t_j is exact near the maximum, and everything is relative to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.scalar_math import LN2, LOG2E, tanh
from unirl_kernels.backends.triton.tiles import is_below, load
from unirl_kernels.batch import IGNORE as IGNORED_TARGET

IGNORE = tl.constexpr(IGNORED_TARGET)
FLOOR = tl.constexpr(-1e4)
"""Stands in for -inf as an exponent where 0 * -inf would be NaN; 2^FLOOR is 0 in fp64 too."""


@triton.jit
def unscaled(x: tl.tensor, inner: tl.tensor, READOUT: tl.constexpr) -> tl.tensor:
    """u, increasing in z: the logit itself, its negative under a negative scale, or tanh(inner x) under a softcap."""
    if READOUT == "softcap":
        return tanh(x * inner)
    elif READOUT == "negated":
        return -x
    else:
        return x


@triton.jit
def finite_base(top: tl.tensor) -> tl.tensor:
    """What u is measured from: its maximum, or 0 where everything is -inf and the difference would be NaN."""
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def rescaled(
    base: tl.tensor, top: tl.tensor, s: tl.tensor, sz: tl.tensor, rate: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Sums relative to ``top``, made relative to ``base``."""
    shift = tl.maximum((top - base) * rate, FLOOR)
    keep = tl.exp2(shift)
    return keep * s, keep * (sz + shift * s)


@triton.jit
def lane_sums(t: tl.tensor, e: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """s and sz of each lane, [LANES], of a tile with exponents t and e = 2^t."""
    return tl.sum(tl.sum(e, 2), 0), tl.sum(tl.sum(e * tl.maximum(t, FLOOR), 2), 0)


@triton.jit
def exponents(u: tl.tensor, top: tl.tensor, rate: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The maximum of each lane with a tile's u, what it means as a base, and the tile's exponents."""
    new_top = tl.maximum(top, tl.max(tl.max(u, 2), 0))
    base = finite_base(new_top)
    return new_top, base, (u - base[None, :, None]) * rate


@triton.jit
def accumulate(
    u: tl.tensor, top: tl.tensor, s: tl.tensor, sz: tl.tensor, rate: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add a tile to the sums of each lane. One maximum and one rescaling per lane and tile, not per element."""
    new_top, base, t = exponents(u, top, rate)
    s, sz = rescaled(base, top, s, sz, rate)
    tile_s, tile_sz = lane_sums(t, tl.exp2(t))
    return new_top, s + tile_s, sz + tile_sz


@triton.jit
def combine(top: tl.tensor, s: tl.tensor, sz: tl.tensor, rate: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sums of all lanes relative to the row's maximum: base, s, sz."""
    base = finite_base(tl.max(top, 0))
    s, sz = rescaled(base, top, s, sz, rate)
    return base, tl.sum(s, 0), tl.sum(sz, 0)


@triton.jit
def masked(
    row: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    inner: tl.tensor,
    COMPUTE: tl.constexpr,
    READOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """u of a tile that may reach beyond ``size`` columns, -inf there."""
    if ALIGNED and READOUT != "softcap":
        # The load itself puts it there, which saves a selection per element.
        OUTSIDE: tl.constexpr = float("inf") if READOUT == "negated" else float("-inf")
        x = load(row, start, size, True, ALIGNED, TILE, OUTSIDE)
        return unscaled(x.to(COMPUTE), inner, READOUT)
    else:
        x = load(row, start, size, True, ALIGNED, TILE)
        u = unscaled(x.to(COMPUTE), inner, READOUT)
        return tl.where(is_below(size, start, TILE), u, float("-inf"))


@triton.jit
def sweep(
    row: tl.tensor,
    size: tl.tensor,
    inner: tl.tensor,
    rate: tl.tensor,
    READOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sums over ``size`` columns of a row: base, s, sz."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    top = tl.full((TILE.lanes,), float("-inf"), rate.dtype)
    s = tl.full((TILE.lanes,), 0.0, rate.dtype)
    sz = tl.full((TILE.lanes,), 0.0, rate.dtype)
    main = size // COLUMNS * COLUMNS
    for start in range(0, main, COLUMNS):
        x = load(row, start, size, False, ALIGNED, TILE)
        top, s, sz = accumulate(unscaled(x.to(rate.dtype), inner, READOUT), top, s, sz, rate)
    if main < size:
        u = masked(row, main, size, inner, rate.dtype, READOUT, ALIGNED, TILE)
        top, s, sz = accumulate(u, top, s, sz, rate)
    return combine(top, s, sz, rate)


@triton.jit
def finish(
    base: tl.tensor, s: tl.tensor, sz: tl.tensor, u_y: tl.tensor, factor: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """logp, entropy, lse of a row from its sums."""
    log_s = tl.log(s)
    return (u_y - base) * factor - log_s, log_s - sz * LN2 / s, base * factor + log_s


@triton.jit
def row_factor(factor: tl.tensor, row_temperature: tl.tensor, row: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """dz/du of a row."""
    if row_temperature is None:
        return tl.full((), factor, COMPUTE)
    else:
        return tl.full((), factor, COMPUTE) / tl.load(row_temperature + row).to(COMPUTE)


@triton.jit
def absent(target: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """What stands for a row that is not computed: 0 where it is ignored, NaN where its target does not exist."""
    return tl.where(target == IGNORE, 0.0, float("nan")).to(COMPUTE)


@triton.jit
def start_of_row(
    x: tl.tensor, row: tl.tensor, length: tl.tensor, stride_b: tl.tensor, stride_l: tl.tensor
) -> tl.tensor:
    """Pointer to row b * length + l of [B, length, V]. 64 bits: T V may exceed 2^31."""
    return x + (row // length).to(tl.int64) * stride_b + (row % length).to(tl.int64) * stride_l


@kernel
def statistics(
    logits: tl.tensor,  # [B, L, V]
    target: tl.tensor,  # [B, L]
    row_temperature: tl.tensor,  # [B, L]
    logp: tl.tensor,  # [B, L]
    entropy: tl.tensor,  # [B, L]
    lse: tl.tensor,  # [B, L]
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
    row = tl.program_id(0)
    y = tl.load(target + row)
    if (y >= 0) & (y < size):
        f = row_factor(factor, row_temperature, row, COMPUTE)
        k = tl.full((), inner, COMPUTE)
        x = start_of_row(logits, row, length, stride_b, stride_l)
        u_y = unscaled(tl.load(x + y).to(COMPUTE), k, READOUT)
        base, s, sz = sweep(x, size, k, f * LOG2E, READOUT, ALIGNED, TILE)
        logp_y, h, log_sum = finish(base, s, sz, u_y, f)
        tl.store(logp + row, logp_y)
        tl.store(entropy + row, h)
        tl.store(lse + row, log_sum)
    else:
        nothing = absent(y, COMPUTE)
        tl.store(logp + row, nothing)
        tl.store(entropy + row, nothing)
        tl.store(lse + row, nothing)
