"""Launch shapes and default kernels: the one place where measurements change something.

They depend on architecture, dtype and V alone, never on the number of rows: the order of a row's sum follows from
them, and a row is to have the same bits in every batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

VECTOR_BYTES = 16
"""Width of the widest load and store of a thread, and the alignment they need."""

KERNELS = ("two_sweep",)
"""One-pass kernels, the default first."""


class Tile(NamedTuple):
    """What a program reads at a time: [unroll, lanes, vector] columns, one thread per lane."""

    unroll: int
    lanes: int
    vector: int
    num_warps: int

    @property
    def columns(self) -> int:
        return self.unroll * self.lanes * self.vector


def tile(dtype: torch.dtype, vocab: int, warp_size: int = 32, *, max_warps: int = 8, unroll: int = 4) -> Tile:
    """The tile for rows of ``vocab`` columns: as many warps as the row fills, at most ``max_warps``.

    Four loads of 16 bytes per thread and 8 warps keep 64 KiB in flight per multiprocessor at 64 registers (4 programs).
    """
    vector = VECTOR_BYTES // dtype.itemsize
    num_warps = 1
    while num_warps < max_warps and num_warps * warp_size * vector * unroll < vocab:
        num_warps *= 2
    return Tile(unroll, num_warps * warp_size, vector, num_warps)
