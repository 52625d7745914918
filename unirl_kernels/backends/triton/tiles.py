"""Tiles of a row: [UNROLL, LANES, VECTOR] columns, one thread per lane and 16 bytes per vector.

Kernels get the three sizes as TILE, a ``geometry.Tile``, which also says whether rows start at a multiple of 16 bytes.

The assignment of columns to threads decides the bits of a sum, so it must not depend on the address of the row. A row
that does not start at a multiple of 16 bytes is read as aligned 16-byte granules, two for each vector, and shifted into
place. So loads stay 128 bits wide, and lane i holds the same columns as in an aligned row. Such a read may touch up to
14 bytes outside of the row, within the 16 bytes of its first or last element. These bytes are memory of the same tensor
or padding of its allocation, and are shifted out. Stores are elementwise, so they follow the alignment of the memory
that is written.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lane_start(TILE: tl.constexpr) -> tl.tensor:
    """[1, LANES, 1] int32: the first column of each lane within a tile."""
    return (tl.arange(0, TILE.lanes) * TILE.vector)[None, :, None]


@triton.jit
def within_lane(TILE: tl.constexpr) -> tl.tensor:
    """[UNROLL, 1, VECTOR] int32: offsets of a lane's columns from its first one. Constants, the same in every thread.

    Addresses, masks and comparisons are split into one number per lane and constants. As column numbers they would
    take one register per element, 32 in every thread, all the time.
    """
    later = tl.arange(0, TILE.unroll) * (TILE.lanes * TILE.vector)
    return later[:, None, None] + tl.arange(0, TILE.vector)[None, None, :]


@triton.jit
def is_column(column: tl.tensor, start: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """[UNROLL, LANES, VECTOR] bool: whether an element of the tile at ``start`` is in ``column``."""
    return column - start - lane_start(TILE) == within_lane(TILE)


@triton.jit
def is_below(size: tl.tensor, start: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """[UNROLL, LANES, VECTOR] bool: whether an element of the tile at ``start`` is one of ``size`` columns."""
    return size - start - lane_start(TILE) > within_lane(TILE)


@triton.jit
def addresses(
    first: tl.tensor, WIDTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr
) -> tl.tensor:
    """[UNROLL, LANES * VECTOR] pointers to a tile that starts at ``first``, a multiple of a vector of WIDTH bytes.

    The compiler lays out threads along contiguous addresses. Here the last dimension is contiguous as a whole. With
    separate dimensions for lanes and vectors, the layout would depend on the version of Triton.
    """
    columns = (tl.arange(0, UNROLL) * (LANES * VECTOR))[:, None] + tl.arange(0, LANES * VECTOR)[None, :]
    return tl.multiple_of(first + columns, (WIDTH // VECTOR, WIDTH))


@triton.jit
def whole_vectors(
    size: tl.tensor, start: tl.tensor, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr
) -> tl.tensor:
    """[UNROLL, LANES * VECTOR] bool: which columns of the tile at ``start`` are below ``size``, a multiple of VECTOR.

    The mask is constant along a vector, so that masked accesses stay 128 bits wide.
    """
    first = tl.arange(0, LANES * VECTOR) // VECTOR * VECTOR
    return size - start - first[None, :] > (tl.arange(0, UNROLL) * (LANES * VECTOR))[:, None]


@triton.jit
def load(
    row: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    OUTSIDE: tl.constexpr = 0.0,
) -> tl.tensor:
    """Load columns ``start ...`` of a row, [UNROLL, LANES, VECTOR]. Beyond ``size``: OUTSIDE if aligned, else anything.

    Args:
        row: pointer to column 0.
        start: a multiple of the tile's size.
        size: columns of the row, a multiple of VECTOR when aligned; read only when MASKED.
        MASKED: whether the tile may reach beyond ``size``.
    """
    if TILE.aligned:
        # The hint is also on the scalar: buffer instructions of AMD GPUs have a scalar address and offsets.
        at = addresses(tl.multiple_of(row + start, 16), 16, TILE.lanes, TILE.vector, TILE.unroll)
        if MASKED:
            x = tl.load(at, mask=whole_vectors(size, start, TILE.lanes, TILE.vector, TILE.unroll), other=OUTSIDE)
        else:
            x = tl.load(at)
        return tl.reshape(x, TILE.unroll, TILE.lanes, TILE.vector)
    else:
        return _load_shifted(row, start, size, MASKED, TILE)


@triton.jit
def _load_shifted(
    row: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """``load`` from any address: lane i reads granules i and i + 1, and takes the 16 of these 32 bytes that are its
    vector.

    Reads up to 15 bytes beyond either end of the row, but only granules that hold a byte of the row: never another
    page.
    """
    BYTES: tl.constexpr = 16 // TILE.vector
    address = row.to(tl.uint64)
    beyond = address % 16
    granules = (address - beyond).to(tl.pointer_type(tl.uint64))
    first_granule = tl.multiple_of(granules + start // TILE.vector * 2, 16)
    at = addresses(first_granule, 16, TILE.lanes, 2, TILE.unroll)
    following = tl.multiple_of(at + 2, (8, 16))
    if MASKED:
        n = (beyond.to(tl.int32) + size * BYTES + 15) // 16 * 2  # 8-byte halves of granules that hold a byte of the row
        low = tl.load(at, mask=whole_vectors(n, start // TILE.vector * 2, TILE.lanes, 2, TILE.unroll), other=0)
        high = tl.load(
            following, mask=whole_vectors(n - 2, start // TILE.vector * 2, TILE.lanes, 2, TILE.unroll), other=0
        )
    else:
        low = tl.load(at)
        # Without a shift the next granule is not needed. It may lie beyond the tensor, or another lane may write it.
        # The comparison is after the broadcast, since Triton's interpreter compares scalars in the operands' dtype.
        high = tl.load(following, mask=tl.broadcast_to(beyond.to(tl.int32), TILE.unroll, TILE.lanes * 2) > 0, other=0)
    w0, w1 = tl.split(tl.reshape(low, TILE.unroll, TILE.lanes, 2))
    w2, w3 = tl.split(tl.reshape(high, TILE.unroll, TILE.lanes, 2))
    far = beyond >= 8
    a = tl.where(far, w1, w0)
    b = tl.where(far, w2, w1)
    c = tl.where(far, w3, w2)
    shift = (beyond % 8) * 8
    # In two steps, since a shift by 64 bits is undefined.
    first = (a >> shift) | ((b << 1) << (63 - shift))
    second = (b >> shift) | ((c << 1) << (63 - shift))
    return tl.reshape(_unpack(first, second, row, BYTES), TILE.unroll, TILE.lanes, TILE.vector)


@triton.jit
def _unpack(first: tl.tensor, second: tl.tensor, row: tl.tensor, BYTES: tl.constexpr) -> tl.tensor:
    """The elements of a vector, in order, along new last dimensions of size 2. Joins keep elements in their thread."""
    if BYTES == 8:
        return tl.join(_element(first, 0, row, 8), _element(second, 0, row, 8))
    elif BYTES == 4:
        even = tl.join(_element(first, 0, row, 4), _element(second, 0, row, 4))
        return tl.join(even, tl.join(_element(first, 32, row, 4), _element(second, 32, row, 4)))
    else:
        e0 = tl.join(_element(first, 0, row, 2), _element(second, 0, row, 2))
        e1 = tl.join(_element(first, 16, row, 2), _element(second, 16, row, 2))
        e2 = tl.join(_element(first, 32, row, 2), _element(second, 32, row, 2))
        e3 = tl.join(_element(first, 48, row, 2), _element(second, 48, row, 2))
        return tl.join(tl.join(e0, e2), tl.join(e1, e3))


@triton.jit
def _element(word: tl.tensor, bit: tl.constexpr, row: tl.tensor, BYTES: tl.constexpr) -> tl.tensor:
    if BYTES == 8:
        return word.to(row.dtype.element_ty, bitcast=True)
    elif BYTES == 4:
        return (word >> bit).to(tl.uint32).to(row.dtype.element_ty, bitcast=True)
    else:
        return (word >> bit).to(tl.uint16).to(row.dtype.element_ty, bitcast=True)


@triton.jit
def store(
    row: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    value: tl.tensor,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Store a tile's columns below ``size``, a multiple of VECTOR. ``row`` is aligned to a vector of its dtype.

    The stored columns leave the L2 first: a gradient is larger than the L2, and logits are read again.
    """
    BYTES: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    WIDTH: tl.constexpr = TILE.vector * BYTES
    at = addresses(tl.multiple_of(row + start, WIDTH), WIDTH, TILE.lanes, TILE.vector, TILE.unroll)
    value = tl.reshape(value.to(row.dtype.element_ty), TILE.unroll, TILE.lanes * TILE.vector)
    if MASKED:
        mask = whole_vectors(size, start, TILE.lanes, TILE.vector, TILE.unroll)
        tl.store(at, value, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(at, value, eviction_policy="evict_first")


@triton.jit
def head_and_body(row: tl.tensor, size: tl.tensor, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Number of columns before the first aligned vector of ``row``, and number of columns in whole vectors after
    that."""
    if TILE.aligned:
        return 0, size
    else:
        BYTES: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
        WHOLE: tl.constexpr = TILE.vector * BYTES
        beyond = (row.to(tl.uint64) % WHOLE).to(tl.int32)
        head = tl.minimum((WHOLE - beyond) % WHOLE // BYTES, size)
        return head, (size - head) // TILE.vector * TILE.vector


@triton.jit
def fringe(head: tl.tensor, body: tl.tensor, size: tl.tensor, VECTOR: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """[2 VECTOR] int32 and bool: the columns outside of aligned vectors, before and after the body."""
    i = tl.arange(0, 2 * VECTOR)
    columns = tl.where(i < VECTOR, i, head + body + i - VECTOR)
    return columns, tl.where(i < VECTOR, i < head, columns < size)


@triton.jit
def fill(row: tl.tensor, size: tl.tensor, value: tl.tensor, TILE: tl.constexpr) -> None:
    """Set a row to ``value``."""
    COLUMNS: tl.constexpr = TILE.unroll * TILE.lanes * TILE.vector
    head, body = fill_fringe(row, size, value, TILE)
    tile = tl.full((TILE.unroll, TILE.lanes, TILE.vector), 0.0, value.dtype) + value
    for start in range(0, body, COLUMNS):
        store(row + head, start, body, tile, True, TILE)


@triton.jit
def fill_slice(row: tl.tensor, size: tl.tensor, value: tl.tensor, TILE: tl.constexpr) -> None:
    """Set a slice, which fits a tile, to ``value``."""
    head, body = fill_fringe(row, size, value, TILE)
    tile = tl.full((TILE.unroll, TILE.lanes, TILE.vector), 0.0, value.dtype) + value
    store(row + head, 0, body, tile, True, TILE)


@triton.jit
def fill_fringe(row: tl.tensor, size: tl.tensor, value: tl.tensor, TILE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Set the columns outside of aligned vectors to ``value``. Returns head and body."""
    head, body = head_and_body(row, size, TILE)
    if not TILE.aligned:
        columns, inside = fringe(head, body, size, TILE.vector)
        tl.store(row + columns, value.to(row.dtype.element_ty), mask=inside)
    return head, body
