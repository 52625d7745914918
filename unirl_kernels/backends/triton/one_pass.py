"""One-pass loss and gradient: a program takes whole rows in two sweeps, or slices of rows that are split."""

from __future__ import annotations

import triton.language as tl

from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.rows import Call, Matrix, Readouts
from unirl_kernels.backends.triton.split_row import split_row
from unirl_kernels.backends.triton.two_sweep import two_sweep


@kernel
def one_pass(
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
    scratch: tl.tensor,  # of ``split_row``: [1 + B * L * slices, RECORD] int64, zeros; None: rows are whole
    rows: tl.int32,  # B * L
    OBJECTIVE: tl.constexpr,
    FIELDS: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    SHAPE: tl.constexpr,  # ``geometry.Split`` of rows that are split, else ``geometry.Tile``
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
