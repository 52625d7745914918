"""Statistics and moments of each row, and observations if their outputs are given, in one read."""

from __future__ import annotations

import triton.language as tl

from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.observations import first_of, observations_of, observe_row
from unirl_kernels.backends.triton.rows import (
    Matrix,
    Readouts,
    Row,
    absent,
    column_of,
    is_computed,
    readout_of,
    start_of_row,
    u_of_target,
    write,
    write_to_all,
)
from unirl_kernels.backends.triton.statistics import combine, statistics_of, sweep


@kernel
def measure(
    logits: tl.tensor,  # [B, L, V]
    target: tl.tensor,  # [B, L], like all tensors below
    row_temperature: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    lse: tl.tensor,
    top: tl.tensor,
    s_minus_1: tl.tensor,
    sz: tl.tensor,
    u_target: tl.tensor,
    log_sum_sq_probs: tl.tensor,  # this and the next three: None without observations
    mean_logit: tl.tensor,
    largest: tl.tensor,
    argmax: tl.tensor,  # int64
    length: tl.int32,
    size: tl.int32,
    stride_b: tl.int64,
    stride_l: tl.int64,
    inner: tl.float64,
    factor: tl.float64,
    READOUT: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program per row."""
    COMPUTE: tl.constexpr = logp.dtype.element_ty
    row = tl.program_id(0)
    y = tl.load(target + row)
    if is_computed(y, size):
        readout = readout_of(Readouts(inner, factor, row_temperature), row, COMPUTE)
        x = Row(start_of_row(Matrix(logits, length, stride_b, stride_l), row), size, column_of(y))
        if argmax is None:
            moments = sweep(x, readout, READOUT, TILE)
        else:
            u_y = u_of_target(x, readout, READOUT)
            seen = observe_row(x, readout, READOUT, TILE)
            column = first_of(seen, x, readout, READOUT, TILE)
            moments = combine(seen.sums, u_y, readout.rate)
        write((logp, entropy, lse), row, statistics_of(moments, readout))
        write((top, s_minus_1, sz, u_target), row, moments)
        if argmax is not None:
            observations = observations_of(seen, column, moments, readout, size)
            write((log_sum_sq_probs, mean_logit, largest, argmax), row, observations)
    else:
        write_to_all((logp, entropy, lse, top, s_minus_1, sz, u_target), row, absent(y, COMPUTE))
        if argmax is not None:
            write_to_all((log_sum_sq_probs, mean_logit, largest), row, absent(y, COMPUTE))
            tl.store(argmax + row, tl.full((), -1, tl.int64))
