"""One-pass loss and gradient, one program per row: a sweep for the statistics, a second one for the gradient.

The second sweep reads the row again, last columns first; it costs DRAM traffic only as far as the rows in flight exceed
the caches.
"""

from __future__ import annotations

import triton.language as tl

from unirl_kernels.backends.triton.gradient import evaluated, write_row
from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.rows import (
    Row,
    Strides,
    absent,
    column_of,
    is_computed,
    readout_of,
    row_fields,
    start_of_row,
    write,
    write_to_all,
)
from unirl_kernels.backends.triton.statistics import statistics_of, sweep
from unirl_kernels.backends.triton.tiles import fill


@kernel
def two_sweep(
    logits: tl.tensor,  # [B, L, V]
    d_logits: tl.tensor,  # [B, L, V]; may be logits
    target: tl.tensor,  # [B, L]
    fields: tl.tensor,  # [FIELDS, B, L]
    parameters: tl.tensor,  # [n_params] fp64; "params" is a name that Triton's launcher takes for itself
    row_temperature: tl.tensor,  # [B, L], as all that follow
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
    OBJECTIVE: tl.constexpr,
    FIELDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    COMPUTE: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0)
    y = tl.load(target + row)
    d_x = start_of_row(d_logits, row, Strides(length, d_stride_b, d_stride_l))
    if is_computed(y, size):
        readout = readout_of(inner, factor, row_temperature, row, COMPUTE)
        x = Row(start_of_row(logits, row, Strides(length, stride_b, stride_l)), size, column_of(y))
        moments = sweep(x, readout, READOUT, TILE)
        stats = statistics_of(moments, readout)
        values = row_fields(fields, row, tl.num_programs(0), FIELDS)
        loss_y, gradients = evaluated(OBJECTIVE, parameters, stats, values)
        tl.store(loss + row, loss_y)
        write((logp, entropy, lse), row, stats)
        # The sums above made every thread wait until the row was read, so it may be overwritten now.
        write_row(x, d_x, readout, moments, stats, gradients, ENTROPY, READOUT, TILE)
    else:
        nothing = absent(y, COMPUTE)
        write_to_all((loss, logp, entropy, lse), row, nothing)
        fill(d_x, size, nothing, TILE)
