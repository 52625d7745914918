"""Multiplies a gradient by a scalar on the device. A scalar of 1 costs only the launch."""

from __future__ import annotations

import triton.language as tl

from unirl_kernels.backends.triton.geometry import Tile
from unirl_kernels.backends.triton.kernel import kernel
from unirl_kernels.backends.triton.rows import Matrix, start_of_row
from unirl_kernels.backends.triton.tiles import fringe, head_and_body, load, store


@kernel
def scale(
    x: tl.tensor,  # [B, L, V]
    factor: tl.tensor,  # one element
    rows: tl.int32,
    length: tl.int32,
    size: tl.int32,
    stride_b: tl.int64,
    stride_l: tl.int64,
    TILE: tl.constexpr,
) -> None:
    """Few programs for many rows, since starting them is the whole cost if the factor is 1."""
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    BODY: tl.constexpr = Tile(TILE.unroll, TILE.lanes, TILE.vector, TILE.num_warps, True)
    k = tl.load(factor).to(COMPUTE)
    if k != 1:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            start_of_x = start_of_row(Matrix(x, length, stride_b, stride_l), row)
            head, body = head_and_body(start_of_x, size, TILE)
            if not TILE.aligned:
                columns, inside = fringe(head, body, size, TILE.vector)
                edge = tl.load(start_of_x + columns, mask=inside, other=0.0).to(COMPUTE) * k
                tl.store(start_of_x + columns, edge.to(x.dtype.element_ty), mask=inside)
            body_of_x = start_of_x + head
            for start in range(0, body, COLUMNS):
                value = load(body_of_x, start, body, True, BODY).to(COMPUTE) * k
                store(body_of_x, start, body, value, True, BODY)
