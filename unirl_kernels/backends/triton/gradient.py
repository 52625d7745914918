"""Gradient of a row's logits from the row's moments and the gradients of its statistics.

    d_z_j = p_j (d_lse - d_logp - d_entropy (log p_j + H)) + d_logp 1[j = y]        d_x_j = d_z_j dz_j/dx_j

The target's entry is d_logp (1 - p_y) plus the rest of the bracket, with 1 - p_y = -expm1(logp). The difference of two
rounded numbers would lose its digits as p_y -> 1. It is put into the tile, in full precision, before the tile is
stored.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from unirl_kernels.backends.groups import RowMoments, RowStats
from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.rows import (
    Matrix,
    Readout,
    Readouts,
    Row,
    absent,
    column_of,
    is_computed,
    readout_of,
    slope,
    start_of_row,
    u_of,
)
from unirl_kernels.backends.triton.scalar_math import LN2, exp, expm1
from unirl_kernels.backends.triton.statistics import FLOOR, finite_base, statistics_of
from unirl_kernels.backends.triton.tiles import fill, fringe, head_and_body, is_column, load, store


class Gradients(NamedTuple):
    """``backends.RowGradients`` of a row; 0 for None."""

    d_logp: tl.tensor
    d_entropy: tl.tensor
    d_lse: tl.tensor


class Terms(NamedTuple):
    """d_x_j = p_j (common + per_bit log2 p_j) at x = 0, where log2 p_j = (u_j - base) rate - shift."""

    base: tl.tensor
    shift: tl.tensor
    common: tl.tensor
    per_bit: tl.tensor
    at_target: tl.tensor  # d_x of the target


@triton.jit
def evaluated(
    OBJECTIVE: tl.constexpr, parameters: tl.tensor, stats: RowStats, fields: tl.tuple
) -> tuple[tl.tensor, Gradients]:
    """The loss of a row, and its gradients."""
    loss, d_logp, d_entropy, d_lse = OBJECTIVE(parameters, *stats, *fields)
    return loss, Gradients(d_logp, d_entropy, d_lse)


@triton.jit
def terms_of(
    moments: RowMoments, stats: RowStats, gradients: Gradients, readout: Readout, READOUT: tl.constexpr
) -> Terms:
    d_logp, d_entropy, d_lse = gradients
    # dz/dx at x = 0: du/dx is 1, or -1 for a negative scale, or the slope of tanh's argument.
    outer = readout.kappa * readout.inner
    surprise = d_lse - d_entropy * (tl.maximum(stats.logp, FLOOR) + stats.entropy)
    at_target = exp(stats.logp) * surprise - d_logp * expm1(stats.logp)
    return Terms(
        finite_base(moments.top),
        tl.log2(1.0 + moments.s_minus_1),
        outer * (d_lse - d_logp - d_entropy * stats.entropy),
        -outer * d_entropy * LN2,
        at_target * slope(moments.u_target, outer, READOUT),
    )


@triton.jit
def log2_prob(d: tl.tensor, rate: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """log2 p = d rate - shift, rounded once. Otherwise the compiler would fuse it or not, depending on the context."""
    return tl.fma(d, rate, -shift)


@triton.jit
def from_log2(log2_p: tl.tensor, terms: Terms, ENTROPY: tl.constexpr) -> tl.tensor:
    """d_x at x = 0 of a column that is not the target's."""
    p = tl.exp2(log2_p)
    if ENTROPY:
        return p * (terms.common + terms.per_bit * tl.maximum(log2_p, FLOOR))
    else:
        return p * terms.common


@triton.jit
def elementwise(
    x: tl.tensor, readout: Readout, terms: Terms, ENTROPY: tl.constexpr, READOUT: tl.constexpr
) -> tl.tensor:
    """d_x of columns other than the target's."""
    u = u_of(x.to(readout.rate.dtype), readout, READOUT)
    log2_p = log2_prob(u - terms.base, readout.rate, terms.shift)
    return slope(u, from_log2(log2_p, terms, ENTROPY), READOUT)


@triton.jit
def descend(
    row: Row,
    d_row: tl.tensor,
    readout: Readout,
    terms: Terms,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write a row of d_logits, the last columns first: the logits that were read last are still in a cache."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    x, size, target = row
    head, body = head_and_body(d_row, size, TILE)
    if not TILE.aligned:
        columns, inside = fringe(head, body, size, TILE.vector)
        edge = tl.load(x + columns, mask=inside, other=0.0)
        d_edge = elementwise(edge, readout, terms, ENTROPY, READOUT)
        d_edge = tl.where(columns == target, terms.at_target, d_edge)
        tl.store(d_row + columns, d_edge.to(d_row.dtype.element_ty), mask=inside)
        x += head
        d_row += head
        target -= head
    main = body // COLUMNS * COLUMNS
    if main < body:
        g = elementwise(load(x, main, body, True, TILE), readout, terms, ENTROPY, READOUT)
        g = tl.where(is_column(target, main, TILE), terms.at_target, g)
        store(d_row, main, body, g, True, TILE)
    for done in range(0, main, COLUMNS):
        start = main - COLUMNS - done
        g = elementwise(load(x, start, body, False, TILE), readout, terms, ENTROPY, READOUT)
        # First check whether the tile holds the target: comparing all its elements takes two operations each.
        if (target >= start) & (target < start + COLUMNS):
            g = tl.where(is_column(target, start, TILE), terms.at_target, g)
        store(d_row, start, body, g, False, TILE)


@triton.jit
def is_zero(gradients: Gradients) -> tl.tensor:
    """Whether a row has no gradient, for any logits."""
    return (gradients.d_logp == 0) & (gradients.d_entropy == 0) & (gradients.d_lse == 0)


@triton.jit
def optional(field: tl.tensor, row: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """A row's entry of a per-row tensor; 0 if the tensor is None."""
    if field is None:
        return tl.full((), 0.0, COMPUTE)
    else:
        return tl.load(field + row).to(COMPUTE)


@triton.jit
def write_row(
    row: Row,
    d_row: tl.tensor,
    readout: Readout,
    moments: RowMoments,
    stats: RowStats,
    gradients: Gradients,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write a row of d_logits."""
    if is_zero(gradients):
        fill(d_row, row.size, tl.full((), 0.0, readout.rate.dtype), TILE)
    else:
        terms = terms_of(moments, stats, gradients, readout, READOUT)
        descend(row, d_row, readout, terms, ENTROPY, READOUT, TILE)


@kernel
def backward(
    logits: tl.tensor,  # [B, L, V]
    d_logits: tl.tensor,  # [B, L, V]; may be logits
    target: tl.tensor,  # [B, L], like all tensors below
    row_temperature: tl.tensor,
    top: tl.tensor,
    s_minus_1: tl.tensor,
    sz: tl.tensor,
    u_target: tl.tensor,
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
    TILE: tl.constexpr,
) -> None:
    """One program per row, one read and one write. The row may be a shard; the moments are those of the whole row."""
    COMPUTE: tl.constexpr = top.dtype.element_ty
    ENTROPY: tl.constexpr = d_entropy is not None
    row = tl.program_id(0)
    y = tl.load(target + row)
    d_x = start_of_row(Matrix(d_logits, length, d_stride_b, d_stride_l), row)
    if is_computed(y, size):
        readout = readout_of(Readouts(inner, factor, row_temperature), row, COMPUTE)
        moments = RowMoments(tl.load(top + row), tl.load(s_minus_1 + row), tl.load(sz + row), tl.load(u_target + row))
        gradients = Gradients(
            optional(d_logp, row, COMPUTE), optional(d_entropy, row, COMPUTE), optional(d_lse, row, COMPUTE)
        )
        stats = statistics_of(moments, readout)
        x = Row(start_of_row(Matrix(logits, length, stride_b, stride_l), row), size, column_of(y))
        write_row(x, d_x, readout, moments, stats, gradients, ENTROPY, READOUT, TILE)
    else:
        fill(d_x, size, absent(y, COMPUTE), TILE)
