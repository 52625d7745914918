"""Launch shapes and the order of kernels: the one place where measurements change something.

They depend on architecture, dtype and V alone, never on the number of rows: the order in which a row is summed follows
from them, and a row is to have the same bits in every batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNELS = ("two_sweep", "split_row")
"""One-pass kernels, the default first."""


VECTOR_BYTES = 16
"""Width of the widest load and store of a thread, and the alignment they need."""

MAX_WARPS = 8
VECTORS_IN_FLIGHT = 4
"""Sweeps: 64 bytes per thread in flight, at 64 registers 64 KiB per multiprocessor."""

SPLIT_MAX_WARPS = 4
HELD_ELEMENTS = 64
"""Split rows: 8192 columns of a row in the registers of 128 threads."""

HELD_ELEMENTS_SOFTCAP = 32
"""tanh takes registers of its own."""

RESIDENT_WARPS = 16
"""Warps of ``split_row`` that share a multiprocessor. More would queue until the tickets are used up."""

REGISTER_FILE = 65536
"""Registers of a multiprocessor, sm_80 to sm_120."""


class Tile(NamedTuple):
    """What a program reads at a time: [unroll, lanes, vector] columns, one thread per lane."""

    unroll: int
    lanes: int
    vector: int
    num_warps: int
    aligned: bool = True  # whether every row starts at a multiple of 16 bytes and consists of whole vectors

    @property
    def columns(self) -> int:
        return self.unroll * self.lanes * self.vector


class Split(NamedTuple):
    """How a row is split over programs."""

    tile: Tile  # holds a slice
    half: Tile  # what an unaligned slice is written by
    slices: int
    padded: int  # slices, rounded up to a power of 2


def tile(dtype: torch.dtype, vocab: int, warp_size: int = 32) -> Tile:
    """The tile that a row is swept with: as many warps as the row fills."""
    return _fill(dtype, vocab, warp_size, MAX_WARPS, VECTORS_IN_FLIGHT)


def slice_tile(dtype: torch.dtype, vocab: int, readout: str, warp_size: int = 32) -> Tile:
    """The tile that holds a slice of a row, or the row, for a kind of readout."""
    held = HELD_ELEMENTS_SOFTCAP if readout == "softcap" else HELD_ELEMENTS
    if dtype == torch.float64:
        held //= 8
    return _fill(dtype, vocab, warp_size, SPLIT_MAX_WARPS, held * dtype.itemsize // VECTOR_BYTES)


def held_registers(dtype: torch.dtype, capability: tuple[int, int], *, plain: bool) -> int:
    """Registers that a thread of ``split_row`` may use: few enough for 3 or 4 programs, without spills.

    At 128 four programs share a multiprocessor, at 168 three: 64 KiB of bf16 logits or 96 KiB of fp32 in registers.
    Triton 3.6 and 3.7 spill nothing then.

    Args:
        dtype: of the logits.
        capability: of the device.
        plain: whether rows are aligned and the loss has no gradient with respect to the entropy.
    """
    if dtype.itemsize == 2:
        return 128 if plain and capability < (10, 0) else 168
    return 168 if plain else 232


def _fill(dtype: torch.dtype, vocab: int, warp_size: int, max_warps: int, unroll: int) -> Tile:
    vector = VECTOR_BYTES // dtype.itemsize
    num_warps = 1
    while num_warps < max_warps and num_warps * warp_size * vector * unroll < vocab:
        num_warps *= 2
    return Tile(unroll, num_warps * warp_size, vector, num_warps)


def split(shape: Tile, vocab: int) -> Split:
    """How rows are split into slices that a tile holds: of whole vectors, and equal but for the last one."""
    count = -(-vocab // shape.columns)
    return Split(shape, shape._replace(unroll=shape.unroll // 2), count, 1 << (count - 1).bit_length())


def programs(shape: Tile, vocab: int, multiprocessors: int, registers: int | None) -> int:
    """How many programs of ``split_row`` to launch at most.

    The slices of a row wait for one another, so all of them have to run at once.

    Args:
        shape: tile that holds a slice.
        vocab: columns of a row.
        multiprocessors: of the device.
        registers: that a thread may use; None where nothing bounds them, and one program per multiprocessor is certain.

    Raises:
        RuntimeError: if the device cannot run all slices of a row at once.
    """
    count = split(shape, vocab).slices
    wanted = RESIDENT_WARPS // shape.num_warps
    certain = 1 if registers is None else min(wanted, REGISTER_FILE // (registers * shape.lanes))
    if count > multiprocessors * certain:
        raise RuntimeError(
            f"kernel 'split_row' needs {count} programs at once for rows of {vocab} logits, and this device runs "
            f"{multiprocessors * certain} ({certain} on each of {multiprocessors} multiprocessors); "
            f"Plan(kernel='two_sweep') has no such limit"
        )
    return multiprocessors * wanted


def whole_row(shape: Tile, vocab: int) -> Tile:
    """A tile that holds the whole row: where programs run one after another, none can wait for another."""
    unroll = shape.unroll
    while unroll * shape.lanes * shape.vector < vocab:
        unroll *= 2
    return shape._replace(unroll=unroll)
