"""Gradient of a row's logits from the gradients of its statistics.

    d_z_j = p_j (d_lse - d_logp - d_entropy (log p_j + H)) + d_logp 1[j = y]        d_x_j = d_z_j dz_j/dx_j

The target's entry is d_logp (1 - p_y) plus the rest of the bracket, with 1 - p_y = -expm1(logp): a difference of two
rounded numbers would lose it as p_y -> 1. It takes its place in the tile before the tile is stored, in full precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.scalar_math import LN2, LOG2E, exp, expm1
from unirl_kernels.backends.triton.statistics import FLOOR, absent, row_factor, start_of_row, unscaled
from unirl_kernels.backends.triton.tiles import fill, fringe, head_and_body, is_column, load, store


@triton.jit
def slope(u: tl.tensor, outer: tl.tensor, READOUT: tl.constexpr) -> tl.tensor:
    """dz/dx, where ``outer`` is its value at x = 0."""
    if READOUT == "softcap":
        return outer * ((1.0 - u) * (1.0 + u))
    else:
        return outer


@triton.jit
def coefficients(
    u_y: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    d_logp: tl.tensor,
    d_entropy: tl.tensor,
    d_lse: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    READOUT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """d_x of the target, and for the other columns d_x = p (common + per_bit log2 p) at x = 0."""
    # dz/dx at x = 0: du/dx is 1, or -1 for a negative scale, or the slope of tanh's argument.
    outer = factor * inner
    surprise = d_lse - d_entropy * (tl.maximum(logp, FLOOR) + entropy)
    at_target = (exp(logp) * surprise - d_logp * expm1(logp)) * slope(u_y, outer, READOUT)
    return at_target, outer * (d_lse - d_logp - d_entropy * entropy), -outer * d_entropy * LN2


@triton.jit
def log2_prob(d: tl.tensor, rate: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """log2 p = d rate - shift, rounded once: left to the compiler, that would depend on what stands around it."""
    return tl.fma(d, rate, -shift)


@triton.jit
def from_log2(log2_p: tl.tensor, common: tl.tensor, per_bit: tl.tensor, ENTROPY: tl.constexpr) -> tl.tensor:
    """p (common + per_bit log2 p): d_x at x = 0 of a column that is not the target's."""
    p = tl.exp2(log2_p)
    if ENTROPY:
        return p * (common + per_bit * tl.maximum(log2_p, FLOOR))
    else:
        return p * common


@triton.jit
def elementwise(
    x: tl.tensor,
    inner: tl.tensor,
    base: tl.tensor,
    rate: tl.tensor,
    shift: tl.tensor,
    common: tl.tensor,
    per_bit: tl.tensor,
    READOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
) -> tl.tensor:
    """d_x of columns other than the target's, with log2 p = (u - base) rate - shift."""
    u = unscaled(x, inner, READOUT)
    return slope(u, from_log2(log2_prob(u - base, rate, shift), common, per_bit, ENTROPY), READOUT)


@triton.jit
def descend(
    row: tl.tensor,
    d_row: tl.tensor,
    size: tl.tensor,
    target: tl.tensor,
    at_target: tl.tensor,
    inner: tl.tensor,
    base: tl.tensor,
    rate: tl.tensor,
    shift: tl.tensor,
    common: tl.tensor,
    per_bit: tl.tensor,
    READOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write ``size`` columns of d_logits, the last first: what was read last is still in a cache."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    head, body = head_and_body(d_row, size, ALIGNED, TILE.vector)
    if not ALIGNED:
        columns, inside = fringe(head, body, size, TILE.vector)
        edge = tl.load(row + columns, mask=inside, other=0.0).to(rate.dtype)
        d_edge = elementwise(edge, inner, base, rate, shift, common, per_bit, READOUT, ENTROPY)
        d_edge = tl.where(columns == target, at_target, d_edge)
        tl.store(d_row + columns, d_edge.to(d_row.dtype.element_ty), mask=inside)
        row += head
        d_row += head
        target -= head
    main = body // COLUMNS * COLUMNS
    if main < body:
        x = load(row, main, body, True, ALIGNED, TILE).to(rate.dtype)
        g = elementwise(x, inner, base, rate, shift, common, per_bit, READOUT, ENTROPY)
        g = tl.where(is_column(target, main, TILE), at_target, g)
        store(d_row, main, body, g, True, TILE)
    for done in range(0, main, COLUMNS):
        start = main - COLUMNS - done
        x = load(row, start, body, False, ALIGNED, TILE).to(rate.dtype)
        g = elementwise(x, inner, base, rate, shift, common, per_bit, READOUT, ENTROPY)
        # The tile is known to hold the target or not before its elements are compared: two operations each.
        if (target >= start) & (target < start + COLUMNS):
            g = tl.where(is_column(target, start, TILE), at_target, g)
        store(d_row, start, body, g, False, TILE)


@triton.jit
def write_row(
    row: tl.tensor,
    d_row: tl.tensor,
    size: tl.tensor,
    target: tl.tensor,
    u_y: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    d_logp: tl.tensor,
    d_entropy: tl.tensor,
    d_lse: tl.tensor,
    inner: tl.tensor,
    factor: tl.tensor,
    base: tl.tensor,
    shift: tl.tensor,
    READOUT: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write a row of d_logits, where log2 p_j = (u_j - base) factor log2(e) - shift."""
    if (d_logp == 0) & (d_entropy == 0) & (d_lse == 0):
        fill(d_row, size, d_logp, ALIGNED, TILE)
    else:
        at_target, common, per_bit = coefficients(u_y, logp, entropy, d_logp, d_entropy, d_lse, inner, factor, READOUT)
        descend(row, d_row, size, target, at_target, inner, base, factor * LOG2E, shift, common, per_bit,
                READOUT, ENTROPY, ALIGNED, TILE)  # fmt: skip


@triton.jit
def optional(field: tl.tensor, row: tl.tensor, otherwise: tl.tensor) -> tl.tensor:
    """Entry of a per-row tensor that may be missing."""
    if field is None:
        return otherwise
    else:
        return tl.load(field + row).to(otherwise.dtype)


@kernel
def backward(
    logits: tl.tensor,  # [B, L, V]
    d_logits: tl.tensor,  # [B, L, V]; may be logits
    target: tl.tensor,  # [B, L], as all that follow
    row_temperature: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    lse: tl.tensor,
    d_logp: tl.tensor,
    d_entropy: tl.tensor,
    d_lse: tl.tensor,
    length: tl.int32,
    size: tl.int32,
    stride_b: tl.int64,
    stride_l: tl.int64,
    d_stride_b: tl.int64,
    d_stride_l: tl.int64,
    inner: tl.float64,
    factor: tl.float64,
    READOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program per row, one read and one write."""
    row = tl.program_id(0)
    y = tl.load(target + row)
    d_x = start_of_row(d_logits, row, length, d_stride_b, d_stride_l)
    if (y >= 0) & (y < size):
        f = row_factor(factor, row_temperature, row, COMPUTE)
        k = tl.full((), inner, COMPUTE)
        x = start_of_row(logits, row, length, stride_b, stride_l)
        u_y = unscaled(tl.load(x + y).to(COMPUTE), k, READOUT)
        logp_y = tl.load(logp + row).to(COMPUTE)
        log_sum = tl.load(lse + row).to(COMPUTE)
        zero = tl.full((), 0.0, COMPUTE)
        # log p_j is (z_j - z_y) + logp or z_j - lse. The number of smaller size brings the smaller rounding.
        near = tl.abs(logp_y) < tl.abs(log_sum)
        base = tl.where(near, u_y, 0.0)
        shift = tl.where(near, -logp_y, log_sum) * LOG2E
        # Every thread has the target's logit before one of them overwrites it.
        tl.debug_barrier()
        write_row(x, d_x, size, y.to(tl.int32), u_y, logp_y, tl.load(entropy + row).to(COMPUTE),
                  optional(d_logp, row, zero), optional(d_entropy, row, zero), optional(d_lse, row, zero),
                  k, f, base, shift, READOUT, d_entropy is not None,
                  ALIGNED, TILE)  # fmt: skip
    else:
        fill(d_x, size, absent(y, COMPUTE), ALIGNED, TILE)
