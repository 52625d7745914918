"""Statistics of each token's row from tiles of logits, tokens by vocabulary, none of which is kept.

A tile gives the moments of its columns; those of all tiles are merged once, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import (
    ELSEWHERE,
    Measured,
    Observed,
    ReadoutArgs,
    RowMoments,
    RowObservations,
    RowStats,
)
from unirl_kernels.backends.moments import kappa_of, merge, statistics
from unirl_kernels.batch import IGNORE
from unirl_kernels.head.chunks import Chunk, by_tokens, chunk_bytes
from unirl_kernels.head.sweep import Head

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
            at = _target_in(chunk.row(target), columns, vocab)
            tiles.append((function(tile.unsqueeze(0), at, chunk.rows(readout)), columns))
    return found


def _target_in(target: Tensor, columns: range, vocab: int) -> Tensor:
    """Targets as a tile of the vocabulary has them; those outside the vocabulary stay outside."""
    inside = (target >= columns.start) & (target < columns.stop)
    elsewhere = (target >= 0) & (target < vocab)
    outside = torch.where(elsewhere, ELSEWHERE, torch.where(target == IGNORE, IGNORE, -1))
    return torch.where(inside, target - columns.start, outside)


def _stacked(groups: Sequence[Any]) -> Any:
    """One group of [n, ...] tensors from n groups."""
    return type(groups[0])(*(torch.stack(values) for values in zip(*groups, strict=True)))


def _merged(tiles: Sequence[RowMoments], readout: ReadoutArgs) -> Measured:
    kappa = kappa_of(readout, tiles[0].top)
    moments = merge(_stacked(tiles), kappa) if len(tiles) > 1 else tiles[0]
    return Measured(statistics(moments, kappa), moments)


def _merged_observations(tiles: Sequence[Tile], row: RowMoments, readout: ReadoutArgs, vocab: int) -> RowObservations:
    """Observations of a row from those of its tiles, with w the probability of falling into a tile:

        log sum p^2 = log sum_tiles w^2 e^l        mean = sum_tiles n mean / V

    and the argmax of the first tile with the largest logit.
    """
    moments: RowMoments = _stacked([tile.moments for tile, _ in tiles])
    of_tiles: RowObservations = _stacked([tile.observations for tile, _ in tiles])
    kappa = kappa_of(readout, row.top)
    log_w = torch.log1p(moments.s_minus_1) - torch.log1p(row.s_minus_1) + (moments.top - row.top) * kappa
    log_w = torch.where(moments.s_minus_1 == -1, -torch.inf, log_w)
    squares = torch.where(log_w == -torch.inf, -torch.inf, of_tiles.log_sum_sq_probs + 2 * log_w)
    share = row.top.new_tensor([len(columns) / vocab for _, columns in tiles])
    starts = torch.tensor([columns.start for _, columns in tiles], device=row.top.device)
    by_tile = (-1, *[1] * row.top.dim())
    largest = of_tiles.largest.amax(0)
    first = (of_tiles.largest == largest).to(torch.int8).argmax(0, keepdim=True)
    argmax = (of_tiles.argmax + starts.view(by_tile)).gather(0, first).squeeze(0)
    return RowObservations(
        torch.logsumexp(squares, 0).clamp(max=0),
        (of_tiles.mean_logit * share.view(by_tile)).sum(0),
        largest,
        torch.where(largest.isnan(), -1, argmax),
    )


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
