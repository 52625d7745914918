"""One-pass loss and gradient, one program per row: a sweep for the statistics, a second one for the gradient.

The second sweep reads the row again, last columns first; it costs DRAM traffic only as far as the rows in flight exceed
the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from unirl_kernels.backends.triton.gradient import optional, write_row
from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.scalar_math import LOG2E
from unirl_kernels.backends.triton.statistics import absent, finish, row_factor, start_of_row, sweep, unscaled
from unirl_kernels.backends.triton.tiles import fill


@triton.jit
def row_fields(
    weight: tl.tensor,
    advantage: tl.tensor,
    old_logp: tl.tensor,
    ref_logp: tl.tensor,
    row: tl.tensor,
    COMPUTE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What the batch says about a row; 0 for what it lacks."""
    zero = tl.full((), 0.0, COMPUTE)
    w = tl.load(weight + row).to(COMPUTE)
    return w, optional(advantage, row, zero), optional(old_logp, row, zero), optional(ref_logp, row, zero)


@triton.jit
def weighted(
    OBJECTIVE: tl.constexpr,
    ON_POLICY: tl.constexpr,
    params: tl.tensor,
    w: tl.tensor,
    advantage: tl.tensor,
    old_logp: tl.tensor,
    ref_logp: tl.tensor,
    logp: tl.tensor,
    entropy: tl.tensor,
    lse: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The objective's loss, d_logp, d_entropy and d_lse at a row, times the row's weight w."""
    if ON_POLICY:
        old_logp = logp
    loss, d_logp, d_entropy, d_lse = OBJECTIVE(params, logp, entropy, lse, old_logp, ref_logp, advantage)
    return w * loss, w * d_logp, w * d_entropy, w * d_lse


@kernel
def two_sweep(
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
    OBJECTIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    READOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    y = tl.load(target + row)
    d_x = start_of_row(d_logits, row, length, d_stride_b, d_stride_l)
    if (y >= 0) & (y < size):
        f = row_factor(factor, row_temperature, row, COMPUTE)
        k = tl.full((), inner, COMPUTE)
        x = start_of_row(logits, row, length, stride_b, stride_l)
        u_y = unscaled(tl.load(x + y).to(COMPUTE), k, READOUT)
        w, a, old, ref = row_fields(weight, advantage, old_logp, ref_logp, row, COMPUTE)
        base, s, sz = sweep(x, size, k, f * LOG2E, READOUT, ALIGNED, TILE)
        logp_y, h, lse = finish(base, s, sz, u_y, f)
        loss_y, d_logp, d_entropy, d_lse = weighted(
            OBJECTIVE, old_logp is None, parameters, w, a, old, ref, logp_y, h, lse
        )
        tl.store(loss + row, loss_y)
        tl.store(logp + row, logp_y)
        tl.store(entropy + row, h)
        # The sums above made every thread wait until the row was read, so it may be overwritten now.
        write_row(x, d_x, size, y.to(tl.int32), u_y, logp_y, h, d_logp, d_entropy, d_lse, k, f, base, tl.log2(s),
                  READOUT, ENTROPY, ALIGNED, TILE)  # fmt: skip
    else:
        nothing = absent(y, COMPUTE)
        tl.store(loss + row, nothing)
        tl.store(logp + row, nothing)
        tl.store(entropy + row, nothing)
        fill(d_x, size, nothing, ALIGNED, TILE)
