"""One-pass loss and gradient, a row split over programs that keep their slice in registers: one read, one write.

A program draws tickets; ticket t is slice t mod SLICES of row t div SLICES. It reads the slice, publishes the slice's
sums, waits until all slices of the row are published, combines them in the order of the slices, and writes its part of
the gradient from the exponentials that it still holds: one exp2 per logit.

Progress: a program publishes before it waits, and draws the next ticket after the row is complete. So every row whose
tickets are all drawn completes, at most one row is partly drawn, and its fewer than SLICES holders leave a slot to the
others if at least SLICES programs are resident, which ``geometry.programs`` makes sure of. Nothing requires all
programs to be.

Records need no fence: a word of 8 bytes holds one number and is 0 until it is published, so a reader either has it or
waits. They also carry the target's logit: read from the row, it could be a gradient already when d_logits is logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.gradient import coefficients, descend, from_log2, log2_prob
from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.scalar_math import LOG2E
from unirl_kernels.backends.triton.statistics import (
    FLOOR,
    absent,
    finish,
    finite_base,
    lane_sums,
    masked,
    rescaled,
    row_factor,
    start_of_row,
    unscaled,
)
from unirl_kernels.backends.triton.tiles import fill, is_column, store
from unirl_kernels.backends.triton.two_sweep import row_fields, weighted

WORDS = tl.constexpr(4)
"""Numbers in a slice's record: maximum of u, s, sz, and u of the target (0 where it is in another slice)."""


@triton.jit
def publish(record: tl.tensor, top: tl.tensor, s: tl.tensor, sz: tl.tensor, u_y: tl.tensor) -> None:
    """Write a record over zeros: each word is the bits of its number plus 1, hence not 0."""
    word = tl.arange(0, WORDS)
    value = tl.where(word == 0, top, tl.where(word == 1, s, tl.where(word == 2, sz, u_y)))
    if top.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        # The NaN of all ones would wrap to 0, and be waited for.
        bits = tl.where(bits == -1, -2, bits)
    else:
        bits = value.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.atomic_or(record + word, bits + 1, sem="relaxed")


@triton.jit
def number(word: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """Inverse of what ``publish`` writes."""
    bits = word - 1
    if COMPUTE.primitive_bitwidth == 64:
        return bits.to(COMPUTE, bitcast=True)
    else:
        return bits.to(tl.int32).to(COMPUTE, bitcast=True)


@triton.jit
def collect(
    records: tl.tensor, rate: tl.tensor, SLICES: tl.constexpr, PADDED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Wait for the records of a row and combine them: base, s, sz, u_y."""
    i = tl.arange(0, PADDED)
    at = records + i[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    exists = tl.broadcast_to((i < SLICES)[:, None], PADDED, WORDS)
    words = tl.load(at, mask=exists, other=1, volatile=True)
    while tl.max(tl.max((words == 0).to(tl.int32), 1), 0) > 0:
        words = tl.load(at, mask=exists, other=1, volatile=True)
    even, odd = tl.split(tl.reshape(words, PADDED, 2, 2))
    top, sz = tl.split(even)
    s, u_y = tl.split(odd)
    top = tl.where(i < SLICES, number(top, rate.dtype), float("-inf"))
    base = finite_base(tl.max(top, 0))
    s, sz = rescaled(base, top, number(s, rate.dtype), number(sz, rate.dtype), rate)
    return base, tl.sum(s, 0), tl.sum(sz, 0), tl.sum(number(u_y, rate.dtype), 0)


@triton.jit
def add(s: tl.tensor, sz: tl.tensor, more_s: tl.tensor, more_sz: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both sums in one reduction take fewer registers than in two, which decides whether sm_100 spills."""
    return s + more_s, sz + more_sz


@triton.jit
def slice_differences(
    x: tl.tensor,
    count: tl.tensor,
    inner: tl.tensor,
    COMPUTE: tl.constexpr,
    READOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Maximum of u over a slice, and how far u is from it; -inf beyond the slice."""
    u = masked(x, 0, count, inner, COMPUTE, READOUT, ALIGNED, TILE)
    top = tl.max(tl.max(tl.max(u, 2), 0), 0)
    return top, u - finite_base(top)


@kernel
def split_row(
    logits: tl.tensor,  # [B, L, V]
    d_logits: tl.tensor,  # [B, L, V]; may be logits
    target: tl.tensor,  # [B, L], as all that follow
    weight: tl.tensor,
    advantage: tl.tensor,
    old_logp: tl.tensor,
    ref_logp: tl.tensor,
    parameters: tl.tensor,  # [n_params] fp64; "params" is a name that Triton's launcher takes for itself
    row_temperature: tl.tensor,
    loss: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    length: tl.int32,
    size: tl.int32,
    stride_b: tl.int64,
    stride_l: tl.int64,
    d_stride_b: tl.int64,
    d_stride_l: tl.int64,
    inner: tl.float64,
    factor: tl.float64,
    scratch: tl.tensor,  # [1 + B * L * SLICES, WORDS] int64, zeros: the next ticket, then the records
    rows: tl.int32,  # B * L
    width: tl.int32,  # columns of a slice, a multiple of a vector
    OBJECTIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,  # TILE with half the unroll
    SLICES: tl.constexpr,
    PADDED: tl.constexpr,  # SLICES rounded up to a power of 2
) -> None:
    """Programs run until the tickets are used up; how many there are does not matter to the result."""
    # Not under a softcap, whose slope would have to be kept too.
    HELD: tl.constexpr = ALIGNED and READOUT != "softcap"
    k = tl.full((), inner, COMPUTE)
    ticket = tl.atomic_add(scratch, 1, sem="relaxed").to(tl.int32)
    while ticket < rows * SLICES:
        row = ticket // SLICES
        part = ticket % SLICES
        count = tl.minimum(width, size - part * width)
        y = tl.load(target + row)
        d_x = start_of_row(d_logits, row, length, d_stride_b, d_stride_l) + part * width
        if (y >= 0) & (y < size):
            f = row_factor(factor, row_temperature, row, COMPUTE)
            rate = f * LOG2E
            x = start_of_row(logits, row, length, stride_b, stride_l) + part * width
            here = y.to(tl.int32) - part * width
            owns = (here >= 0) & (here < count)
            # 0 in the other slices: u(0) = 0, and the sum over slices is the target's.
            u_y = unscaled(tl.load(x + here, mask=owns, other=0.0).to(COMPUTE), k, READOUT)
            w, a, old, ref = row_fields(weight, advantage, old_logp, ref_logp, row, COMPUTE)
            top, d = slice_differences(x, count, k, COMPUTE, READOUT, ALIGNED, TILE)
            t = d * rate
            e = tl.exp2(t)
            lane_s, lane_sz = lane_sums(t, e)
            records = scratch + (1 + row.to(tl.int64) * SLICES) * WORDS
            slice_s, slice_sz = tl.reduce((lane_s, lane_sz), 0, add)
            publish(records + part * WORDS, top, slice_s, slice_sz, u_y)
            row_base, row_s, row_sz, u_y = collect(records, rate, SLICES, PADDED)
            ticket = tl.atomic_add(scratch, 1, sem="relaxed").to(tl.int32)
            logp_y, h, lse = finish(row_base, row_s, row_sz, u_y, f)
            loss_y, d_logp, d_entropy, d_lse = weighted(
                OBJECTIVE, old_logp is None, parameters, w, a, old, ref, logp_y, h, lse
            )
            if part == 0:
                tl.store(loss + row, loss_y)
                tl.store(logp + row, logp_y)
                tl.store(entropy + row, h)
            at_target, common, per_bit = coefficients(u_y, logp_y, h, d_logp, d_entropy, d_lse, k, f, READOUT)
            # e_j is 2^t_j, relative to the slice; p_j = e_j 2^lag / s, relative to the row.
            lag = tl.maximum((top - row_base) * rate, FLOOR)
            if ENTROPY:
                shift = tl.log2(row_s) - lag
            else:
                common *= tl.exp2(lag) / row_s
                shift = tl.full((), 0.0, COMPUTE)
            if HELD:
                if ENTROPY:
                    # From d, not from e as well: both would take twice the registers.
                    g = from_log2(log2_prob(d, rate, shift), common, per_bit, ENTROPY)
                else:
                    g = e * common
                if owns:
                    g = tl.where(is_column(here, 0, TILE), at_target, g)
                store(d_x, 0, count, g, True, TILE)
            else:
                # From the cache: in registers the columns do not form the vectors to be stored, or the slope is gone.
                # By half tiles, for shifting takes registers too.
                descend(x, d_x, count, here, at_target, k, finite_base(top), rate, shift, common, per_bit,
                        READOUT, ENTROPY, ALIGNED, HALF)  # fmt: skip
        else:
            nothing = absent(y, COMPUTE)
            if part == 0:
                tl.store(loss + row, nothing)
                tl.store(logp + row, nothing)
                tl.store(entropy + row, nothing)
            fill(d_x, count, nothing, ALIGNED, TILE)
            ticket = tl.atomic_add(scratch, 1, sem="relaxed").to(tl.int32)
