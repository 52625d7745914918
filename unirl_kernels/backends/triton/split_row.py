"""One-pass loss and gradient of a row that is split over programs. Each keeps its slice in registers: one read, one
write.

A program draws tickets; ticket t is slice t mod SLICES of row t div SLICES. The program reads the slice, publishes its
moments, waits until all slices of the row are published, merges their moments in the order of the slices, and writes
its slice of the gradient from the exponentials in its registers: one exp2 per logit.

Why there is no deadlock: a program publishes before it waits, and draws its next ticket only when all tickets of the
row are drawn. Consider the first row that is not complete. Its drawn tickets are published, or will be: their programs
do not wait for anything else, since all earlier rows are complete. If some of its tickets are not drawn, fewer than
SLICES programs wait for this row, and none waits for a later row. So another program draws them, if at least SLICES
programs are resident. ``geometry.programs`` ensures this. Not all programs have to be resident.

Each entry is polled by exactly one thread, since ``geometry.split`` makes at least as many entries as there are
threads. Otherwise threads that poll the same entry may see different values, and Triton assumes that they are equal.

Records need no fence: an entry of 8 bytes holds one number and is 0 until it is published, so a reader either has the
number or waits. Records also carry the target's logit: in the row it may already be overwritten by its gradient if
d_logits is logits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from unirl_kernels.backends.groups import RowMoments, RowStats
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.gradient import (
    Gradients,
    Terms,
    descend,
    evaluated,
    from_log2,
    is_zero,
    log2_prob,
    terms_of,
)
from unirl_kernels.backends.triton.rows import (
    Call,
    Readout,
    Row,
    absent,
    column_of,
    is_computed,
    readout_of,
    row_fields,
    start_of_row,
    u_of_target,
    write,
    write_to_all,
)
from unirl_kernels.backends.triton.scalar_math import LN2
from unirl_kernels.backends.triton.statistics import (
    FLOOR,
    Sums,
    finite_base,
    lane_sums,
    masked,
    rescaled,
    statistics_of,
)
from unirl_kernels.backends.triton.tiles import fill_slice, is_column, store

RECORD = tl.constexpr(geometry.RECORD)
"""Numbers in a slice's record: its ``RowMoments``, with sz in bits, not nats."""


class Slice(NamedTuple):
    """The slice of a program, in registers."""

    moments: RowMoments  # with sz in bits, not nats
    d: tl.tensor  # u_j - max u; -inf beyond the slice
    e: tl.tensor  # 2^(d rate)


@triton.jit
def add(
    s: tl.tensor, ones: tl.tensor, sz: tl.tensor, other_s: tl.tensor, other_ones: tl.tensor, other_sz: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Combine three sums in one reduction: that takes fewer registers than three, and sm_100 does not spill."""
    return s + other_s, ones + other_ones, sz + other_sz


@triton.jit
def read_slice(x: Row, readout: Readout, READOUT: tl.constexpr, TILE: tl.constexpr) -> Slice:
    u_target = u_of_target(x, readout, READOUT)
    u = masked(x, 0, readout, READOUT, TILE)
    top = tl.max(tl.max(tl.max(u, 2), 0), 0)
    d = u - finite_base(top)
    t = d * readout.rate
    e = tl.exp2(t)
    s, sz = lane_sums(t, e)
    ones = tl.floor(s)
    s, ones, sz = tl.reduce((s - ones, ones, sz), 0, add)
    return Slice(RowMoments(top, s + (ones - 1.0), sz, u_target), d, e)


@triton.jit
def draw(scratch: tl.tensor) -> tl.tensor:
    """The next ticket."""
    return tl.atomic_add(scratch, 1, sem="relaxed").to(tl.int32)


@triton.jit
def publish(record: tl.tensor, moments: RowMoments) -> None:
    """Write a record over zeros. An entry is the bits of its number plus 1, so it is not 0."""
    entry = tl.arange(0, RECORD)
    value = tl.where(entry == 2, moments.sz, moments.u_target)
    value = tl.where(entry == 0, moments.top, tl.where(entry == 1, moments.s_minus_1, value))
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        # A NaN with all bits set would wrap to 0, and readers would wait for it.
        bits = tl.where(bits == -1, -2, bits)
    else:
        bits = value.to(tl.uint32, bitcast=True).to(tl.int64)
    tl.atomic_or(record + entry, bits + 1, sem="relaxed")


@triton.jit
def number(entry: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """The number of an entry that ``publish`` wrote."""
    bits = entry - 1
    if COMPUTE.primitive_bitwidth == 64:
        return bits.to(COMPUTE, bitcast=True)
    else:
        return bits.to(tl.int32).to(COMPUTE, bitcast=True)


@triton.jit
def merged(entries: tl.tensor, rate: tl.tensor, SPLIT: tl.constexpr) -> RowMoments:
    """Moments of a row from the records of its slices."""
    exists = tl.arange(0, SPLIT.padded) < SPLIT.slices
    even, odd = tl.split(tl.reshape(number(entries, rate.dtype), SPLIT.padded, 2, 2))
    tops, sz = tl.split(even)
    s_minus_1, u_target = tl.split(odd)
    tops = tl.where(exists, tops, float("-inf"))
    top = tl.max(tops, 0)
    base = finite_base(top)
    s, sz = rescaled(base, Sums(tops, 1.0 + s_minus_1, sz), rate)
    # s_minus_1 of a slice with the row's largest logit lacks a 1. Add these ones again, except one for the row.
    holds = tops == base
    row_s_minus_1 = tl.sum(tl.where(holds, s_minus_1, s), 0) + (tl.sum(holds.to(tl.int32), 0) - 1)
    return RowMoments(top, row_s_minus_1, tl.sum(sz, 0) * LN2, tl.max(tl.where(exists, u_target, float("-inf")), 0))


@triton.jit
def exchange(
    scratch: tl.tensor, row: tl.tensor, part: tl.tensor, moments: RowMoments, rate: tl.tensor, SPLIT: tl.constexpr
) -> tuple[RowMoments, tl.tensor]:
    """Publish the moments of a slice, and wait for those of the others. Returns the row's moments and the next ticket.

    If all tickets of the row are drawn, the next ticket is drawn before the wait, else after it. All threads must take
    the same branch, but scalar loads of memory that changes may differ between threads. Hence each lane loads, and a
    reduction decides.
    """
    records = scratch + (1 + row.to(tl.int64) * SPLIT.slices) * RECORD
    publish(records + part * RECORD, moments)
    i = tl.arange(0, SPLIT.padded)
    at = records + i[:, None] * RECORD + tl.arange(0, RECORD)[None, :]
    exists = tl.broadcast_to((i < SPLIT.slices)[:, None], SPLIT.padded, RECORD)
    entries = tl.load(at, mask=exists, other=1, volatile=True)
    drawn = tl.load(scratch + tl.full((SPLIT.tile.lanes,), 0, tl.int32), volatile=True)
    ahead = tl.min(drawn.to(tl.int32), 0) >= (row + 1) * SPLIT.slices
    ticket = tl.full((), 0, tl.int32)
    if ahead:
        ticket = draw(scratch)
    while tl.max(tl.max((entries == 0).to(tl.int32), 1), 0) > 0:
        entries = tl.load(at, mask=exists, other=1, volatile=True)
    if not ahead:
        ticket = draw(scratch)
    return merged(entries, rate, SPLIT), ticket


@triton.jit
def write_slice(
    x: Row,
    d_x: tl.tensor,
    held: Slice,
    readout: Readout,
    moments: RowMoments,
    stats: RowStats,
    gradients: Gradients,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Write a slice of d_logits."""
    TILE: tl.constexpr = SPLIT.tile
    HALF: tl.constexpr = SPLIT.half
    terms = terms_of(moments, stats, gradients, readout, READOUT)
    # e_j is relative to the slice; p_j = e_j 2^lag / s, relative to the row.
    lag = tl.maximum((held.moments.top - terms.base) * readout.rate, FLOOR)
    shift = terms.shift - lag
    common = terms.common
    if not ENTROPY:
        shift = tl.full((), 0.0, lag.dtype)
        common *= tl.exp2(lag) / (1.0 + moments.s_minus_1)
    terms = Terms(finite_base(held.moments.top), shift, common, terms.per_bit, terms.at_target)
    if TILE.aligned and READOUT != "softcap":
        if ENTROPY:
            # Computed from d alone: keeping e too would take twice the registers.
            g = from_log2(log2_prob(held.d, readout.rate, shift), terms, ENTROPY)
        else:
            g = held.e * common
        if (x.target >= 0) & (x.target < x.size):
            g = tl.where(is_column(x.target, 0, TILE), terms.at_target, g)
        store(d_x, 0, x.size, g, True, TILE)
    else:
        # Reads the logits again, from the cache: the columns in registers do not match the vectors of the store, or
        # with a softcap the slope is not kept. In half tiles, since shifting takes registers too.
        descend(x, d_x, readout, terms, ENTROPY, READOUT, HALF)


@triton.jit
def split_row(
    call: Call,
    scratch: tl.tensor,
    rows: tl.tensor,
    OBJECTIVE: tl.constexpr,
    FIELDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Programs run until all tickets are drawn. Their number does not change the result."""
    COMPUTE: tl.constexpr = call.results[0].dtype.element_ty
    TILE: tl.constexpr = SPLIT.tile
    width = tl.cdiv(call.size, SPLIT.slices * TILE.vector) * TILE.vector
    ticket = draw(scratch)
    while ticket < rows * SPLIT.slices:
        row, part = ticket // SPLIT.slices, ticket % SPLIT.slices
        first = part * width
        y = tl.load(call.target + row)
        count = tl.minimum(width, call.size - first)
        d_x = start_of_row(call.d_logits, row) + first
        # A row without a gradient is filled with one value, ignored or not. One fill at the end serves both cases.
        value = absent(y, COMPUTE)
        filled = not is_computed(y, call.size)
        if filled:
            if part == 0:
                write_to_all(call.results, row, value)
            ticket = draw(scratch)
        else:
            readout = readout_of(call.readouts, row, COMPUTE)
            x = Row(start_of_row(call.logits, row) + first, count, column_of(y) - first)
            held = read_slice(x, readout, READOUT, TILE)
            values = row_fields(call.fields, row, rows, FIELDS)  # these loads overlap with the wait
            moments, ticket = exchange(scratch, row, part, held.moments, readout.rate, SPLIT)
            stats = statistics_of(moments, readout)
            loss, gradients = evaluated(OBJECTIVE, call.parameters, stats, values)
            if part == 0:
                write(call.results, row, (loss, stats.logp, stats.entropy, stats.lse))
            value = tl.full((), 0.0, COMPUTE)
            filled = is_zero(gradients)
            if not filled:
                write_slice(x, d_x, held, readout, moments, stats, gradients, ENTROPY, READOUT, SPLIT)
        if filled:
            fill_slice(d_x, count, value, TILE)
