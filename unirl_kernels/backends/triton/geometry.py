"""Launch shapes and the choice of kernels. All numbers that measurements may change are in this file.

They depend only on the device, the dtype and V, never on the number of rows: they determine the order in which a row is
summed, and a row must have the same bits in every batch.

All numbers are predictions (``benchmarks/NOTES.md``, "The kernel by default"): no GPU has run this yet. The environment
can change them, to measure other sizes: ``UNIRL_GEOMETRY="held_elements=128 split_max_warps=2"``.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import NamedTuple

import torch

KERNELS = ("two_sweep", "split_row")
"""One-pass kernels."""

VARIABLE = "UNIRL_GEOMETRY"

ANY_VOCAB = sys.maxsize


class Sizes(NamedTuple):
    """The sizes that ``UNIRL_GEOMETRY`` may set."""

    max_warps: int = 8
    wide_warps: int = 16
    """Warps of ``two_sweep`` if only half as many rows in flight fit the L2 cache."""
    vectors_in_flight: int = 4
    """Loads in flight per thread in a sweep: 64 bytes; with 64 registers, 64 KiB per multiprocessor."""
    l2_percent: int = 50
    """The part of the L2 cache that the rows in flight of ``two_sweep`` may fill, with their gradients. The second
    sweep then finds 95 % of a row in the cache, or 76 % if both halves of the cache hold the same data."""
    split_max_warps: int = 4
    held_elements: int = 64
    """Columns of a slice per thread of ``split_row``: the registers of 128 threads hold 8192 columns."""
    held_elements_softcap: int = 32
    """The same with a softcap, since tanh needs registers too."""
    resident_warps: int = 16
    """Warps of ``split_row`` per multiprocessor. More would only wait until all tickets are drawn."""
    held_registers: int = 0
    """Registers of a thread of ``split_row``; 0: the function ``held_registers`` decides."""
    cooperative: int = 1
    """Whether ``split_row`` is launched so that the driver starts all of its programs or none."""


def variant_of(text: str) -> Sizes:
    """Parse sizes from a text such as ``"held_elements=128 split_max_warps=2"``; the others keep their defaults.

    Raises:
        ValueError: when a name is not one of ``Sizes``, or a size is not a whole number.
    """
    sizes = {}
    for setting in text.split():
        name, _, size = setting.partition("=")
        if name not in Sizes._fields or not size.isdecimal():
            raise ValueError(f"{VARIABLE} must be made of {'=N '.join(Sizes._fields)}=N, got {setting!r}")
        sizes[name] = int(size)
    return Sizes(**sizes)


SIZES = variant_of(os.environ.get(VARIABLE, ""))

VECTOR_BYTES = 16
"""Width of the widest load and store of a thread, and the alignment they need."""

SWEEP_WARPS = {2: 32, 4: 48, 8: 16}
"""Warps of ``two_sweep`` per multiprocessor, by the bytes of a logit: with 64, 40 and 90 registers per thread."""

REGISTER_FILE = 65536
"""Registers of a multiprocessor, sm_80 to sm_120."""

QUARTERS = 4
"""Parts of a multiprocessor, each with its own registers: a warp gets all of its registers from one of them."""

REGISTER_UNIT = 256
"""A warp gets registers in multiples of this."""

RECORD = 4
"""Numbers in the record of a slice of ``split_row``."""


class Device(NamedTuple):
    """The properties of a device that a choice depends on."""

    multiprocessors: int
    capability: tuple[int, int]
    is_nvidia: bool
    l2_bytes: int = 0


@cache
def device_of(device: torch.device) -> Device:
    """Properties of a device. A CPU counts as one multiprocessor, since programs run one after another."""
    if device.type != "cuda":
        return Device(1, (0, 0), False)
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, (found.major, found.minor), not torch.version.hip, found.L2_cache_size)


class Tile(NamedTuple):
    """The columns that a program reads at a time: [unroll, lanes, vector], one thread per lane."""

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
    half: Tile  # an unaligned slice is written in half tiles
    slices: int
    padded: int  # records that a program loads at a time, a power of 2: at least one entry per thread


def kernels_by_vocab(device: Device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The default one-pass kernels, each with the longest row that it takes.

    ``two_sweep`` reads a row twice. If the rows in flight do not fit the L2 cache, the second read goes to DRAM: half
    of the floor's traffic in addition. Then ``split_row``, which reads once, is predicted to be faster.
    """
    if not device.is_nvidia:
        return (("two_sweep", ANY_VOCAB),)
    return (
        ("two_sweep", _most_in_cache(device, dtype, SIZES.wide_warps)),
        ("split_row", _most_split(device, dtype)),
        ("two_sweep", ANY_VOCAB),
    )


def _most_in_cache(device: Device, dtype: torch.dtype, num_warps: int) -> int:
    """The longest row such that all rows in flight of ``two_sweep``, with their gradients, fit in the L2 cache."""
    programs = device.multiprocessors * (SWEEP_WARPS[dtype.itemsize] // num_warps)
    return device.l2_bytes * SIZES.l2_percent // 100 // (programs * 2 * dtype.itemsize)


def _most_split(device: Device, dtype: torch.dtype) -> int:
    """The longest row whose slices all run at once, for any readout, loss and addresses."""
    shape = slice_tile(dtype, ANY_VOCAB, "softcap")
    registers = held_registers(dtype, device.capability, plain=False)
    return device.multiprocessors * certain_programs(shape, registers) * shape.columns


def two_sweep_tile(device: Device, dtype: torch.dtype, vocab: int, warp_size: int = 32) -> Tile:
    """The tile of ``two_sweep``: as ``tile``, but with more warps if the rows in flight fit the L2 cache only then."""
    wide = device.is_nvidia and _most_in_cache(device, dtype, SIZES.max_warps) < vocab <= _most_in_cache(
        device, dtype, SIZES.wide_warps
    )
    return _fill(dtype, vocab, warp_size, SIZES.wide_warps if wide else SIZES.max_warps, SIZES.vectors_in_flight)


def tile(dtype: torch.dtype, vocab: int, warp_size: int = 32) -> Tile:
    """The tile of a sweep: as many warps as the row fills."""
    return _fill(dtype, vocab, warp_size, SIZES.max_warps, SIZES.vectors_in_flight)


def slice_tile(dtype: torch.dtype, vocab: int, readout: str, warp_size: int = 32) -> Tile:
    """The tile that holds a slice of a row, or a whole short row, for a kind of readout."""
    held = SIZES.held_elements_softcap if readout == "softcap" else SIZES.held_elements
    if dtype == torch.float64:
        held //= 8
    return _fill(dtype, vocab, warp_size, SIZES.split_max_warps, held * dtype.itemsize // VECTOR_BYTES)


def held_registers(dtype: torch.dtype, capability: tuple[int, int], *, plain: bool) -> int:
    """Registers that a thread of ``split_row`` may use: few enough for 3 or 4 programs, without spills.

    With 128 registers four programs fit on a multiprocessor, with 168 three: 64 KiB of bf16 logits or 96 KiB of fp32
    logits in registers. Triton 3.6 and 3.7 then spill nothing.

    Args:
        dtype: of the logits.
        capability: of the device.
        plain: whether rows are aligned and the loss has no gradient with respect to the entropy.
    """
    if SIZES.held_registers:
        return SIZES.held_registers
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
    """Split rows into slices that fit a tile: whole vectors, all equal except the last slice."""
    count = -(-vocab // shape.columns)
    # With fewer entries than threads, several threads would poll the same entry. They may see different values, and a
    # reduction over the program would take one of these at random: the wait could end while others hold an old value.
    padded = max(1 << (count - 1).bit_length(), shape.lanes // RECORD)
    return Split(shape, shape._replace(unroll=shape.unroll // 2), count, padded)


def certain_programs(shape: Tile, registers: int | None) -> int:
    """The number of programs of ``split_row`` that certainly run at once on a multiprocessor.

    Args:
        shape: tile that holds a slice.
        registers: the limit per thread; None: no limit, then only one program is certain.
    """
    if registers is None:
        return 1
    of_warp = -(-registers * shape.lanes // shape.num_warps // REGISTER_UNIT) * REGISTER_UNIT
    warps = REGISTER_FILE // QUARTERS // of_warp * QUARTERS
    return min(SIZES.resident_warps, warps) // shape.num_warps


def programs(shape: Tile, vocab: int, multiprocessors: int, registers: int | None, *, cooperative: bool = False) -> int:
    """The largest number of programs of ``split_row`` to launch.

    The slices of a row wait for one another, so all of them have to run at once. A cooperative launch starts all of its
    programs or none. Otherwise two concurrent launches could each hold a part of the device and wait for the rest. A
    cooperative launch may have only as many programs as certainly fit.

    Args:
        shape: tile that holds a slice.
        vocab: columns of a row.
        multiprocessors: of the device.
        registers: as in ``certain_programs``.
        cooperative: whether the launch is cooperative.

    Raises:
        RuntimeError: if the device cannot run all slices of a row at once.
    """
    count, certain = split(shape, vocab).slices, certain_programs(shape, registers)
    if count > multiprocessors * certain:
        raise RuntimeError(
            f"kernel 'split_row' needs {count} programs at once for rows of {vocab} logits, and this device runs "
            f"{multiprocessors * certain} ({certain} on each of {multiprocessors} multiprocessors); "
            f"Plan(kernel='two_sweep') has no such limit"
        )
    return multiprocessors * (certain if cooperative else SIZES.resident_warps // shape.num_warps)


def whole_row(shape: Tile, vocab: int) -> Tile:
    """A tile that holds the whole row, for the interpreter: its programs run one after another and cannot wait."""
    unroll = shape.unroll
    while unroll * shape.lanes * shape.vector < vocab:
        unroll *= 2
    return shape._replace(unroll=unroll)
