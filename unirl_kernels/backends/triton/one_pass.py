"""One-pass loss and gradient: a program processes a whole row in two sweeps, or slices of split rows."""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.gradient import evaluated, write_row
from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.rows import (
    Call,
    Matrix,
    Readouts,
    Row,
    absent,
    column_of,
    is_computed,
    readout_of,
    row_fields,
    start_of_row,
    write,
    write_to_all,
)
from unirl_kernels.backends.triton.split_row import split_row
from unirl_kernels.backends.triton.statistics import statistics_of, sweep
from unirl_kernels.backends.triton.tiles import fill


@triton.jit
def two_sweep(
    call: Call,
    OBJECTIVE: tl.constexpr,
    FIELDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program per row: a sweep for the statistics, a second one for the gradient, last columns first.

    The second sweep reads from DRAM only if the rows in flight exceed the caches.
    """
    COMPUTE: tl.constexpr = call.results[0].dtype.element_ty
    row = tl.program_id(0)
    y = tl.load(call.target + row)
    d_x = start_of_row(call.d_logits, row)
    if is_computed(y, call.size):
        readout = readout_of(call.readouts, row, COMPUTE)
        x = Row(start_of_row(call.logits, row), call.size, column_of(y))
        moments = sweep(x, readout, READOUT, TILE)
        stats = statistics_of(moments, readout)
        values = row_fields(call.fields, row, tl.num_programs(0), FIELDS)
        loss, gradients = evaluated(OBJECTIVE, call.parameters, stats, values)
        write(call.results, row, (loss, stats.logp, stats.entropy, stats.lse))
        # The reductions above have synchronised the threads, so the whole row was read and may be overwritten.
        write_row(x, d_x, readout, moments, stats, gradients, ENTROPY, READOUT, TILE)
    else:
        nothing = absent(y, COMPUTE)
        write_to_all(call.results, row, nothing)
        fill(d_x, call.size, nothing, TILE)


@kernel
def one_pass(
    logits: tl.tensor,  # [B, L, V]
    d_logits: tl.tensor,  # [B, L, V]; may be logits
    target: tl.tensor,  # [B, L]
    fields: tl.tensor,  # [FIELDS, B, L]
    parameters: tl.tensor,  # [n_params] fp64; not "params", which Triton's launcher overwrites
    row_temperature: tl.tensor,  # [B, L], like all tensors down to lse
    loss: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    lse: tl.tensor,
    length: tl.int32,
    size: tl.int32,
    stride_b: tl.int64,
    stride_l: tl.int64,
    d_stride_b: tl.int64,
    d_stride_l: tl.int64,
    inner: tl.float64,
    factor: tl.float64,
    scratch: tl.tensor,  # for ``split_row``: [1 + B * L * slices, RECORD] int64, zeros; None for ``two_sweep``
    rows: tl.int32,  # B * L
    OBJECTIVE: tl.constexpr,
    FIELDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    SHAPE: tl.constexpr,  # ``geometry.Split`` for ``split_row``, ``geometry.Tile`` for ``two_sweep``
) -> None:
    call = Call(
        Matrix(logits, length, stride_b, stride_l),
        Matrix(d_logits, length, d_stride_b, d_stride_l),
        size,
        target,
        Readouts(inner, factor, row_temperature),
        fields,
        parameters,
        (loss, logp, entropy, lse),
    )
    if scratch is None:
        two_sweep(call, OBJECTIVE, FIELDS, ENTROPY, READOUT, SHAPE)
    else:
        split_row(call, scratch, rows, OBJECTIVE, FIELDS, ENTROPY, READOUT, SHAPE)
