"""One-pass loss and gradient, one program per row: a sweep for the statistics, a second one for the gradient.

The second sweep reads the row again, last columns first; it costs DRAM traffic only as far as the rows in flight exceed
the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.gradient import evaluated, write_row
from unirl_kernels.backends.triton.rows import (
    Call,
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
        # The sums above made every thread wait until the row was read, so it may be overwritten now.
        write_row(x, d_x, readout, moments, stats, gradients, ENTROPY, READOUT, TILE)
    else:
        nothing = absent(y, COMPUTE)
        write_to_all(call.results, row, nothing)
        fill(d_x, call.size, nothing, TILE)
