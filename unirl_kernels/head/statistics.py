"""Statistics of each token's row from tiles of logits, tokens by vocabulary, none of which is kept.

A tile gives the moments of its columns; those of all tiles are merged once, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import (
    Measured,
    Observed,
    ReadoutArgs,
    RowMoments,
    RowObservations,
    RowStats,
)
from unirl_kernels.backends.moments import kappa_of, merge, merge_observations, statistics, target_in
from unirl_kernels.batch import IGNORE
from unirl_kernels.head.chunks import Chunk, by_tokens, chunk_bytes
from unirl_kernels.head.sweep import Head
from unirl_kernels.operators.shards import Tiles, moments_of_tiles, tiles_like

TOKENS_OF_TILE = 1024
"""Enough for a matmul to run at full speed; the rest of a tile's memory goes into its width."""


def measure(head: Head, target: Tensor, readout: ReadoutArgs, max_chunk_bytes: int | None) -> Measured:
    """Statistics and moments of all tokens, in target's shape; 0 where the target is ``IGNORE``, NaN where it is
    otherwise outside [0, V).

    Args:
        head: what makes the logits.
        target: [B, L].
        readout: how logits become log-probabilities.
        max_chunk_bytes: memory for a tile; None for the default.
    """
    stats, moments = _no_rows(RowStats, target, head), _no_rows(RowMoments, target, head)
    for chunk, tiles in _tiles(head, target, readout, max_chunk_bytes, head.kernels.token_stats):
        of_chunk = _merged([tile.moments for tile, _ in tiles], chunk.rows(readout))
        _put(chunk, Measured(stats, moments), of_chunk, target)
    return Measured(stats, moments)


def observe(head: Head, target: Tensor, readout: ReadoutArgs, max_chunk_bytes: int | None) -> Observed:
    """``measure``, and what else is observed of the rows; argmax -1 where the target is not in the vocabulary."""
    found = Observed(*(_no_rows(group, target, head) for group in (RowStats, RowMoments, RowObservations)))
    vocab = head.weight.shape[0]
    for chunk, tiles in _tiles(head, target, readout, max_chunk_bytes, head.kernels.token_observations):
        row_readout = chunk.rows(readout)
        measured = _merged([tile.moments for tile, _ in tiles], row_readout)
        observations = _merged_observations(tiles, measured.moments, row_readout, vocab)
        _put(chunk, found, Observed(*measured, observations), target)
    return found


def measure_chunks(
    head: Head, target: Tensor, readout: ReadoutArgs, tiles: Tiles, max_chunk_bytes: int | None
) -> RowMoments:
    """Moments of all tokens, [slots, B, L], of the chunks of logits that the gradient is made in.

    A matmul of other sizes rounds otherwise, and moments of other logits give probabilities that do not add up to 1.
    """
    if not head.weight.shape[0]:
        return moments_of_tiles(head.kernels.token_stats, head.empty(*target.shape, 0), target, readout, tiles)
    found = RowMoments(*(x.zero_() for x in tiles_like(target, head.row_dtype, tiles)))

    def measure(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowMoments:
        return moments_of_tiles(head.kernels.token_stats, logits, target, readout, tiles)

    for chunk, of_chunk in _chunks(head, target, readout, max_chunk_bytes, measure):
        for k in range(tiles.slots):
            whole, part = (RowMoments(*(x[k] for x in moments)) for moments in (found, of_chunk))
            _put(chunk, (whole,), (part,), target)
    return found


def observe_chunks(head: Head, target: Tensor, readout: ReadoutArgs, max_chunk_bytes: int | None) -> Observed:
    """``measure_chunks``, and what else is observed of the rows."""
    found = Observed(*(_no_rows(group, target, head) for group in (RowStats, RowMoments, RowObservations)))
    for chunk, of_chunk in _chunks(head, target, readout, max_chunk_bytes, head.kernels.token_observations):
        _put(chunk, found, of_chunk, target)
    return found


def _chunks(
    head: Head,
    target: Tensor,
    readout: ReadoutArgs,
    max_chunk_bytes: int | None,
    function: Callable[[Tensor, Tensor, ReadoutArgs], Any],
) -> Iterator[tuple[Chunk, Any]]:
    """What a function of the backend finds in the rows of each chunk."""
    chunks, _ = head.chunks(target.reshape(-1), max_chunk_bytes)
    memory = head.empty(max((chunk.n for chunk in chunks), default=0), head.weight.shape[0])
    for chunk in chunks:
        logits = memory[: chunk.n]
        head.matmuls.logits(chunk.take(head.hidden).to(head.dtype), head.bias, logits)
        yield chunk, function(logits.unsqueeze(0), chunk.row(target), chunk.rows(readout))


Tile = tuple[Any, range]
"""What a backend found in a tile, and the columns of the tile."""


def _tiles(
    head: Head,
    target: Tensor,
    readout: ReadoutArgs,
    max_chunk_bytes: int | None,
    function: Callable[[Tensor, Tensor, ReadoutArgs], Any],
) -> Sequence[tuple[Chunk, list[Tile]]]:
    """What a function of the backend finds in the tiles of each chunk of tokens."""
    vocab = head.weight.shape[0]
    logits = max(1, chunk_bytes(head.weight.device, max_chunk_bytes) // head.row_dtype.itemsize)
    chunks = by_tokens(target.reshape(-1), min(TOKENS_OF_TILE, logits))
    width = min(max(1, logits // TOKENS_OF_TILE), vocab)
    memory = head.empty(max((chunk.n for chunk in chunks), default=0) * width)
    found: list[tuple[Chunk, list[Tile]]] = [(chunk, []) for chunk in chunks]
    # Tiles of the vocabulary first: a weight in another dtype is converted once, part by part.
    for start in range(0, vocab, width):
        columns = range(start, min(start + width, vocab))
        part = head.columns(columns.start, columns.stop)
        for chunk, tiles in found:
            tile = memory[: chunk.n * len(columns)].view(chunk.n, len(columns))
            part.matmuls.logits(chunk.take(part.hidden).to(part.dtype), part.bias, tile)
            at = target_in(chunk.row(target), columns, vocab)
            tiles.append((function(tile.unsqueeze(0), at, chunk.rows(readout)), columns))
    return found


def _stacked(groups: Sequence[Any]) -> Any:
    """One group of [n, ...] tensors from n groups."""
    return type(groups[0])(*(torch.stack(values) for values in zip(*groups, strict=True)))


def _merged(tiles: Sequence[RowMoments], readout: ReadoutArgs) -> Measured:
    kappa = kappa_of(readout, tiles[0].top)
    moments = merge(_stacked(tiles), kappa) if len(tiles) > 1 else tiles[0]
    return Measured(statistics(moments, kappa), moments)


def _merged_observations(tiles: Sequence[Tile], row: RowMoments, readout: ReadoutArgs, vocab: int) -> RowObservations:
    moments: RowMoments = _stacked([tile.moments for tile, _ in tiles])
    found: RowObservations = _stacked([tile.observations for tile, _ in tiles])
    by_tile = (-1, *[1] * row.top.dim())
    share = row.top.new_tensor([len(columns) / vocab for _, columns in tiles]).view(by_tile)
    starts = torch.tensor([columns.start for _, columns in tiles], device=row.top.device).view(by_tile)
    of_tiles = found._replace(mean_logit=found.mean_logit * share, argmax=found.argmax + starts)
    return merge_observations(of_tiles, moments, row, kappa_of(readout, row.top))


def _no_rows(group: Any, target: Tensor, head: Head) -> Any:
    """What stands for tokens that are ignored. No views: users may change in place what an operator returns."""
    zeros = (target.new_zeros(target.shape, dtype=head.row_dtype) for _ in group._fields)
    values = dict(zip(group._fields, zeros, strict=True))
    if "argmax" in values:
        values["argmax"] = torch.full_like(target, -1)
    return group(**values)


def _put(chunk: Chunk, whole: Any, found: Any, target: Tensor) -> None:
    """Write what was found in a chunk, [1, n] each, into groups of target's shape; 0 for targets that are ignored."""
    ignored = chunk.row(target).squeeze(0) == IGNORE
    for of_whole, of_chunk in zip(whole, found, strict=True):
        for values, new in zip(of_whole, of_chunk, strict=True):
            new = new.squeeze(0)
            chunk.put(values.view(-1), new.masked_fill(ignored, 0) if new.is_floating_point() else new)
