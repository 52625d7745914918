"""Which tokens are worked on together: as many as the memory for their logits allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unirl_kernels.batch import IGNORE, Batch

Values = TypeVar("Values", bound="tuple[Any, ...]")

DEFAULT_CHUNK_BYTES = {"cpu": 2**28}
DEFAULT_CHUNK_BYTES_OF_ACCELERATORS = 2**31
"""Logits of one chunk, bytes. Every chunk reads and writes the whole gradient of the weight once, so that small ones
cost time: on a GPU that traffic takes 735 / tokens of the product's own time (fp32 accumulation, H200)."""


def chunk_bytes(device: torch.device, max_chunk_bytes: int | None) -> int:
    """What ``Plan.max_chunk_bytes`` means on a device: itself, or the default."""
    if max_chunk_bytes is not None:
        return max_chunk_bytes
    return DEFAULT_CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES_OF_ACCELERATORS)


def rows_per_chunk(row_bytes: int, device: torch.device, max_chunk_bytes: int | None) -> int:
    """Tokens whose logits fit into the memory of one chunk.

    Args:
        row_bytes: memory for the logits of one token, and for what is made of them.
        device: where they lie.
        max_chunk_bytes: of ``Plan``.

    Raises:
        ValueError: when not even one row fits into a ``max_chunk_bytes`` that somebody gave.
    """
    rows = chunk_bytes(device, max_chunk_bytes) // row_bytes
    if not rows and max_chunk_bytes is not None:
        raise ValueError(f"max_chunk_bytes must hold the logits of one token, {row_bytes} bytes, got {max_chunk_bytes}")
    return max(1, rows)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some of T tokens.

    Args:
        places: which; a slice where they lie next to each other, else [n] int64.
        n: how many.
    """

    places: slice | Tensor
    n: int

    def take(self, x: Tensor) -> Tensor:
        """[n, ...] of [T, ...]: the chunk's part, a view where it can be."""
        return x[self.places] if isinstance(self.places, slice) else x.index_select(0, self.places)

    def row(self, x: Tensor) -> Tensor:
        """[1, n] of [T], in any shape, as row kernels take it."""
        return self.take(x.reshape(-1)).unsqueeze(0)

    def rows(self, values: Values) -> Values:
        """The same of every tensor in a named tuple."""
        return type(values)(*(self.row(x) if isinstance(x, Tensor) else x for x in values))

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the chunk's part, [n, ...], of [T, ...]."""
        whole[self.places] = part.to(whole.dtype)


def by_tokens(target: Tensor, most: int) -> list[Chunk]:
    """All tokens that count, in order, in as few chunks of about equal size as can be.

    Finding them waits for an accelerator once. A CUDA graph that is being recorded cannot wait, and gets all T.

    Args:
        target: [T].
        most: tokens per chunk.
    """
    places = None if _is_recorded(target) else (target != IGNORE).nonzero().squeeze(-1)
    n = target.numel() if places is None else places.numel()
    if n == target.numel():
        places = None
    return [
        Chunk(slice(start, end) if places is None else places[start:end], end - start) for start, end in _even(n, most)
    ]


def without_ignored(hidden: Tensor, target: Tensor) -> Tensor:
    """Hidden states, [T, D], that chunks may take: zeros at ignored tokens where ``by_tokens`` has to include those.

    Their logits' gradients are zeros, and 0 * NaN would not be 0 in that of the weight.
    """
    return hidden.masked_fill((target == IGNORE).unsqueeze(-1), 0) if _is_recorded(target) else hidden


def _is_recorded(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _even(n: int, most: int) -> Iterator[tuple[int, int]]:
    pieces = -(-n // most)
    for piece in range(pieces):
        yield n * piece // pieces, n * (piece + 1) // pieces


@dataclass(frozen=True, eq=False)
class Group:
    """Whole sequences, or whole pairs of sequences, that fit one chunk.

    Args:
        chunk: their tokens, those of a sequence next to each other.
        lengths: tokens of each sequence; of pairs, all chosen ones come first.
        units: [first, last) of the sequences or pairs.
    """

    chunk: Chunk
    lengths: Sequence[int]
    units: tuple[int, int]


def by_units(batch: Batch, scope: str, most: int) -> list[Group] | None:
    """The tokens that count, sequence by sequence or pair by pair; None where one unit alone is too long for a chunk.

    Args:
        batch: the batch.
        scope: of the loss; single tokens may be cut apart anywhere.
        most: tokens per chunk.

    Raises:
        ValueError: when the sequences of a loss of pairs are odd in number.
    """
    if scope == "token":
        return [Group(chunk, [chunk.n], (0, 0)) for chunk in by_tokens(batch.target.reshape(-1), most)]
    lengths = batch.lengths.tolist()
    places = (batch.target.reshape(-1) != IGNORE).nonzero().squeeze(-1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    units: list[tuple[int, ...]] = [(s,) for s in range(len(lengths))]
    if scope == "pair":
        units = [(s, batch.n_pairs + s) for s in range(batch.n_pairs)]
    sizes = [sum(lengths[s] for s in unit) for unit in units]
    if max(sizes, default=0) > most:
        return None
    groups = []
    for first, last in _packed(sizes, most):
        # Transposed: of pairs, the chosen ones first and then the rejected.
        sequences = [s for column in zip(*units[first:last], strict=True) for s in column]
        parts = [places[ends[s] - lengths[s] : ends[s]] for s in sequences]
        chunk = Chunk(torch.cat(parts), sum(sizes[first:last]))
        groups.append(Group(chunk, [lengths[s] for s in sequences], (first, last)))
    return groups


def _packed(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbours of at most ``most`` in all, as many as fit."""
    first = total = 0
    for i, size in enumerate(sizes):
        if total + size > most:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)
