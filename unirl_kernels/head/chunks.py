"""Chunks of tokens, as large as the memory for their logits allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unirl_kernels.backends.groups import ProgramArgs
from unirl_kernels.batch import IGNORE, Batch
from unirl_kernels.head.sizes import Sizes

Values = TypeVar("Values", bound="tuple[Any, ...]")

DEFAULT_CHUNK_BYTES = {"cpu": 2**28}
DEFAULT_CHUNK_BYTES_OF_ACCELERATORS = 11 * 2**28
"""Bytes for logits and their gradient. Every group of tokens except the first reads and writes the whole gradient of
the weight once more. 2.75 GiB hold the 8192 tokens of a step at V = 152064, so that one matmul suffices."""


def chunk_bytes(device: torch.device, max_chunk_bytes: int | None) -> int:
    """``Plan.max_chunk_bytes``, or the default of the device."""
    if max_chunk_bytes is not None:
        return max_chunk_bytes
    return DEFAULT_CHUNK_BYTES.get(device.type, DEFAULT_CHUNK_BYTES_OF_ACCELERATORS)


def rows_per_chunk(row_bytes: int, device: torch.device, max_chunk_bytes: int | None) -> int:
    """The number of tokens that fit into one chunk; each needs ``row_bytes`` for its logits and their gradient.

    Raises:
        ValueError: when not even one token fits into the given ``max_chunk_bytes``.
    """
    rows = chunk_bytes(device, max_chunk_bytes) // row_bytes
    if not rows and max_chunk_bytes is not None:
        raise ValueError(f"max_chunk_bytes must hold the logits of one token, {row_bytes} bytes, got {max_chunk_bytes}")
    return max(1, rows)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some of T tokens."""

    positions: slice | Tensor  # a slice if they are contiguous, else [n] int64
    n: int

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """The chunk's part, [n, ...], of [T, ...]; a view if possible."""
        if isinstance(self.positions, slice):
            return x.narrow(dim, self.positions.start, self.n)
        return x.index_select(dim, self.positions)

    def row(self, x: Tensor) -> Tensor:
        """[1, n] of [T], in any shape, as row kernels take it."""
        return self.take(x.reshape(-1)).unsqueeze(0)

    def rows(self, group: Values) -> Values:
        """``row`` of every tensor in a group."""
        return type(group)(*(self.row(x) if isinstance(x, Tensor) else x for x in group))

    def program(self, program: ProgramArgs) -> ProgramArgs:
        """The program on the chunk's fields, [n_fields, 1, n]."""
        return program._replace(fields=self.take(program.fields.flatten(1), 1).unsqueeze(1).contiguous())

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the chunk's part, [n, ...], of [T, ...]."""
        if isinstance(self.positions, slice):
            self.take(whole).copy_(part)
        else:
            whole[self.positions] = part.to(whole.dtype)

    def put_rows(self, whole: Iterable[Tensor], part: Iterable[Tensor]) -> None:
        """Write the results of the chunk's rows, [1, n] each, into tensors with T elements."""
        for of_all, of_chunk in zip(whole, part, strict=True):
            self.put(of_all.view(-1), of_chunk.squeeze(0))


def counted_tokens(target: Tensor) -> tuple[Tensor | None, int]:
    """Positions of the tokens that are not ignored, of target [T], and their number; None if no token is ignored.

    Finding them waits for an accelerator once. While a CUDA graph is recorded this is impossible, and all T are taken.
    """
    counted = None if is_recorded(target) else (target != IGNORE).nonzero().squeeze(-1)
    n = target.numel() if counted is None else counted.numel()
    return (None, n) if n == target.numel() else (counted, n)


def evenly(counted: Tensor | None, n: int, most: int) -> list[Chunk]:
    """Cut the result of ``counted_tokens`` into as few chunks of at most ``most`` tokens as possible, of equal size."""
    return [_chunk(counted, start, end) for start, end in _even(n, most)]


def by_sizes(counted: Tensor | None, n: int, sizes: Sizes) -> list[list[Chunk]]:
    """Cut the result of ``counted_tokens`` into groups, and each group into chunks."""
    groups = []
    for start in range(0, n, sizes.group):
        end = min(start + sizes.group, n)
        groups.append([_chunk(counted, at, min(at + sizes.chunk, end)) for at in range(start, end, sizes.chunk)])
    return groups


def _chunk(counted: Tensor | None, start: int, end: int) -> Chunk:
    return Chunk(slice(start, end) if counted is None else counted[start:end], end - start)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Consecutive chunks as one chunk."""
    if len(chunks) == 1:
        return chunks[0]
    n, positions = sum(chunk.n for chunk in chunks), [chunk.positions for chunk in chunks]
    if isinstance(positions[0], slice):
        return Chunk(slice(positions[0].start, positions[0].start + n), n)
    return Chunk(torch.cat([p for p in positions if isinstance(p, Tensor)]), n)


def without_ignored(hidden: Tensor, target: Tensor) -> Tensor:
    """Hidden states, [T, D], for chunks. If chunks include ignored tokens, their hidden states are set to zero.

    The gradients of their logits are zero, but 0 * NaN would not be 0 in the gradient of the weight.
    """
    return hidden.masked_fill((target == IGNORE).unsqueeze(-1), 0) if is_recorded(target) else hidden


def is_recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being recorded. Chunks then hold ignored tokens, too."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _even(n: int, most: int) -> Iterator[tuple[int, int]]:
    parts = -(-n // most)
    for part in range(parts):
        yield n * part // parts, n * (part + 1) // parts


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a batch whose losses do not depend on the rest, and that fits one chunk."""

    batch: Batch  # the part, ignored positions included
    positions: slice | Tensor  # of the part, among the flat positions of the whole
    chunk: Chunk  # its tokens that are not ignored, among those of the whole
    pairs: tuple[int, int]  # [first, last) of the pairs that it holds; [0, 0) for a narrower scope

    def weights(self, of_term: Tensor, scope: str) -> Tensor:
        """A term's weights of this part: of its pairs or of its positions, by the term's scope."""
        if scope == "batch":  # the part is the whole batch
            return of_term.reshape(-1)
        return of_term[slice(*self.pairs)] if scope == "pair" else of_term.reshape(-1)[self.positions]


def by_units(batch: Batch, scope: str, most: int) -> list[Part] | None:
    """Cut the batch into parts of at most ``most`` tokens; None if a unit that must not be cut is longer, and for
    sequences that are split over ranks.

    Raises:
        ValueError: when a loss of pairs has an odd number of sequences.
    """
    if scope == "token":
        return _by_positions(batch, most)
    if batch.ranks is not None:  # split sequences: sums over the ranks need all of them at once
        return None
    lengths = batch.lengths.tolist()
    if scope == "pair":
        chosen, rejected = batch.split_pairs(torch.arange(batch.n_sequences, device="cpu"))
        units = torch.stack([chosen, rejected], 1).tolist()
    elif scope == "sequence":
        units = [[s] for s in range(len(lengths))]
    else:
        units = [list(range(len(lengths)))]
    sizes = [sum(lengths[s] for s in unit) for unit in units]
    if max(sizes, default=0) > most:
        return None
    return [_part(batch, scope, units, span) for span in _packed(sizes, most)]


def _part(batch: Batch, scope: str, units: Sequence[Sequence[int]], span: tuple[int, int]) -> Part:
    members = units[slice(*span)]
    # For pairs in halves: the chosen ones first, then the rejected ones.
    columns = zip(*members, strict=True) if scope == "pair" and batch.pairs == "halves" else members
    sequences = torch.tensor([s for column in columns for s in column], dtype=torch.int64, device=batch.target.device)
    positions, _ = batch.positions_of(sequences)
    own = batch.sequences(sequences)
    counted = positions[own.valid]
    pairs = {"pair": span, "batch": (0, batch.n_sequences // 2)}.get(scope, (0, 0))
    return Part(own, positions, Chunk(counted, counted.numel()), pairs)


def _by_positions(batch: Batch, most: int) -> list[Part]:
    valid = batch.valid.reshape(-1)
    counted = valid.nonzero().squeeze(-1)
    parts, begin = [], 0
    for first, last in _even(counted.numel(), most):
        end = valid.numel() if last == counted.numel() else int(counted[last])
        chunk = Chunk(counted[first:last], last - first)
        parts.append(Part(batch.tokens(begin, end), slice(begin, end), chunk, (0, 0)))
        begin = end
    return parts


def _packed(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """[first, last) of consecutive sizes whose sum is at most ``most``."""
    first = total = 0
    for i, size in enumerate(sizes):
        if total + size > most:
            yield first, i
            first, total = i, 0
        total += size
    if sizes:
        yield first, len(sizes)
