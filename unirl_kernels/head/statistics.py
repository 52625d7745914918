"""Statistics of each token's row from tiles of logits, tokens by vocabulary, which are not kept.

A tile gives the moments of its columns. The moments of all tiles are merged once, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends.groups import (
    Measure,
    Measured,
    Observed,
    ReadoutArgs,
    RowMoments,
    RowObservations,
    RowStats,
)
from unirl_kernels.backends.moments import kappa_of, merge, merge_observations, placed, statistics, target_in
from unirl_kernels.batch import IGNORE
from unirl_kernels.head.chunks import Chunk, counted_tokens, evenly, is_recorded
from unirl_kernels.head.sweep import Head
from unirl_kernels.operators.declare import flat
from unirl_kernels.operators.shards import Tiles, moments_of_tiles, tiles_like

TOKENS_OF_TILE = 1024
"""Enough tokens for a matmul at full speed. The width of a tile takes the rest of the memory."""

LEAST_COLUMNS = 1024
"""Of a tile, as far as the memory goes; then it has fewer tokens. The results for all tiles are kept until they are
merged: some ten numbers per token and tile."""


def measured_in_tiles(head: Head, target: Tensor, readout: ReadoutArgs) -> Measured:
    """Statistics and moments of all tokens, in target's shape.

    They are 0 if the target is ``IGNORE``, and NaN if it is another value outside [0, V).
    """
    found = Measured(*no_rows(target, head, RowStats, RowMoments))
    _in_tiles(head, target, readout, head.kernels.token_stats, found)
    return found


def observed_in_tiles(head: Head, target: Tensor, readout: ReadoutArgs) -> Observed:
    """The same, and observations; the argmax is -1 if the target is outside [0, V)."""
    found = Observed(*no_rows(target, head, RowStats, RowMoments, RowObservations))
    _in_tiles(head, target, readout, head.kernels.token_observations, found)
    return found


def moments_in_chunks(head: Head, target: Tensor, readout: ReadoutArgs, tiles: Tiles) -> RowMoments:
    """Moments of all tokens, [slots, B, L], computed in the same chunks of logits as the gradient.

    A matmul of other sizes rounds differently, and moments of differently rounded logits would give probabilities that
    do not add up to 1.
    """
    measure = partial(moments_of_tiles, head.kernels.token_stats, tiles=tiles)
    if not head.weight.shape[0]:
        return measure(head.empty(*target.shape, 0), target, readout)
    found = RowMoments(*(x.zero_() for x in tiles_like(target, head.row_dtype, tiles)))
    for chunk, of_chunk in _chunks(head, target, readout, measure):
        for whole, part in zip(found, of_chunk, strict=True):
            chunk.put_rows(whole, part)
    return found


def observed_in_chunks(head: Head, target: Tensor, readout: ReadoutArgs) -> Observed:
    """Statistics, moments and observations of all tokens, computed in the same chunks."""
    found = Observed(*no_rows(target, head, RowStats, RowMoments, RowObservations))
    for chunk, of_chunk in _chunks(head, target, readout, head.kernels.token_observations):
        chunk.put_rows(flat(found), flat(of_chunk))
    return found


def _chunks(
    head: Head, target: Tensor, readout: ReadoutArgs, measure: Callable[..., Any]
) -> Iterator[tuple[Chunk, Any]]:
    """The results of a backend function for each chunk."""
    chunks = [chunk for group in head.groups(target) for chunk in group]
    memory = head.empty(max((chunk.n for chunk in chunks), default=0), head.weight.shape[0])
    for chunk in chunks:
        logits = memory[: chunk.n]
        head.matmuls.logits(chunk.take(head.hidden).to(head.dtype), head.bias, logits)
        yield chunk, measure(logits.unsqueeze(0), chunk.row(target), chunk.rows(readout))


Tile = tuple[Any, range]
"""The results for a tile, without statistics, and its columns."""


def _in_tiles(head: Head, target: Tensor, readout: ReadoutArgs, measure: Measure, whole: Measured | Observed) -> None:
    """Write the results of a backend function for all tokens."""
    for chunk, tiles in _tiles(head, target, readout, measure):
        chunk.put_rows(flat(whole), flat(_merged(tiles, chunk.rows(readout), head.weight.shape[0])))
    if is_recorded(target):  # tiles of ignored tokens add up to statistics that are not 0
        for x in flat(whole):
            x.masked_fill_(target == IGNORE, 0 if x.is_floating_point() else -1)


def _tiles(head: Head, target: Tensor, readout: ReadoutArgs, measure: Measure) -> Sequence[tuple[Chunk, list[Tile]]]:
    """The results of a backend function for the tiles of each chunk of tokens."""
    vocab = head.weight.shape[0]
    logits = max(1, head.chunk_bytes // head.row_dtype.itemsize)
    width = min(max(logits // TOKENS_OF_TILE, min(LEAST_COLUMNS, logits)), vocab)
    chunks = evenly(*counted_tokens(target.reshape(-1)), min(TOKENS_OF_TILE, logits // width))
    memory = head.empty(max((chunk.n for chunk in chunks), default=0) * width)
    found: list[tuple[Chunk, list[Tile]]] = [(chunk, []) for chunk in chunks]
    # The outer loop is over the vocabulary, so that each part of the weight is converted once.
    for start in range(0, vocab, width):
        columns = range(start, min(start + width, vocab))
        part = head.columns(columns.start, columns.stop)
        for chunk, tiles in found:
            tile = memory[: chunk.n * len(columns)].view(chunk.n, len(columns))
            part.matmuls.logits(chunk.take(part.hidden).to(part.dtype), part.bias, tile)
            at = target_in(chunk.row(target), columns, vocab)
            tiles.append((measure(tile.unsqueeze(0), at, chunk.rows(readout))[1:], columns))
    return found


def _stacked(groups: Sequence[Any]) -> Any:
    """One group of [n, ...] tensors from n groups."""
    return type(groups[0])(*(torch.stack(values) for values in zip(*groups, strict=True)))


def _merged(tiles: Sequence[Tile], readout: ReadoutArgs, vocab: int) -> Measured | Observed:
    """The results for the rows of a chunk, merged from those of its tiles."""
    moments = [tile[0] for tile, _ in tiles]
    kappa = kappa_of(readout, moments[0].top)
    row = merge(_stacked(moments), kappa) if len(tiles) > 1 else moments[0]
    stats = statistics(row, kappa)
    if len(tiles[0][0]) == 1:
        return Measured(stats, row)
    seen = [placed(tile[1], columns.start, len(columns) / vocab) for tile, columns in tiles]
    return Observed(stats, row, merge_observations(_stacked(seen), _stacked(moments), row, kappa))


def no_rows(target: Tensor, head: Head, *groups: type[Any]) -> list[Any]:
    """Groups with the values of ignored tokens. They share no memory: users may change results in place."""
    dtype = head.row_dtype

    def value(field: str) -> Tensor:
        return torch.full_like(target, -1) if field == "argmax" else target.new_zeros(target.shape, dtype=dtype)

    return [group(*map(value, group._fields)) for group in groups]
