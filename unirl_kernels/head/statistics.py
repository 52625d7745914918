"""What is measured of each token's row, from tiles of logits, tokens by vocabulary, none of which is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.backends import ReadoutArgs, RowObservations, RowStats
from unirl_kernels.batch import IGNORE
from unirl_kernels.head.chunks import Chunk, by_tokens, chunk_bytes
from unirl_kernels.head.sweep import Head

TOKENS_OF_TILE = 1024
"""Enough for a matrix product to run at full speed; the rest of a tile's memory goes into its width."""

Rows = TypeVar("Rows", RowStats, RowObservations)


class Share(NamedTuple):
    """What a part of the vocabulary is of the parts together."""

    log_weight: Tensor  # log of the probability of falling into it
    width: float  # of its columns


@dataclass(frozen=True, eq=False)
class Measurement(Generic[Rows]):
    """What can be measured in pieces of a row.

    Args:
        function: of a backend that measures a piece, its name.
        rows: what it returns.
        merge: rows of two neighbouring pieces, and their shares in both together, made those of both.
    """

    function: str
    rows: type[Rows]
    merge: Callable[[Rows, Rows, Share, Share], Rows]


def measure(
    what: Measurement[Rows], head: Head, target: Tensor, readout: ReadoutArgs, max_chunk_bytes: int | None
) -> Rows:
    """Rows of all tokens, [T] each; 0 where the target is ``IGNORE``, NaN where it is otherwise outside [0, V), and
    there -1 for integers.

    Args:
        what: is measured.
        head: what makes the logits.
        target: [T].
        readout: how logits become log-probabilities.
        max_chunk_bytes: memory for a tile; None for the default.
    """
    vocab = head.weight.shape[0]
    logits = max(1, chunk_bytes(head.weight.device, max_chunk_bytes) // head.row_dtype.itemsize)
    chunks = by_tokens(target, min(TOKENS_OF_TILE, logits))
    width = min(max(1, logits // TOKENS_OF_TILE), vocab)
    tile = head.empty(max((chunk.n for chunk in chunks), default=0) * width)
    found: list[Rows] = []
    # Pieces first: a weight in another dtype is converted once, piece by piece.
    for start in range(0, vocab, width):
        stop = min(start + width, vocab)
        piece = head.words(start, stop)
        for k, chunk in enumerate(chunks):
            part = _of_piece(what, piece, start, chunk, target, readout, tile)
            if start == 0:
                found.append(part)
            else:
                found[k] = what.merge(found[k], part, *_shares(found[k], part, start, stop))
    results = what.rows(*(_nothing(name, target, head.row_dtype) for name in what.rows._fields))
    for chunk, rows in zip(chunks, found, strict=True):
        for whole, values in zip(results, _finished(rows, chunk.take(target), vocab), strict=True):
            chunk.put(whole, values)
    return results


def _nothing(name: str, target: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands for tokens that are ignored."""
    return torch.full_like(target, -1) if name == "argmax" else target.new_zeros(target.shape, dtype=dtype)


def _of_piece(
    what: Measurement[Rows],
    piece: Head,
    start: int,
    chunk: Chunk,
    target: Tensor,
    readout: ReadoutArgs,
    tile: Tensor,
) -> Rows:
    """The rows of a few tokens in the words from ``start`` on that a piece of the head has."""
    shape = chunk.n, piece.weight.shape[0]
    logits = tile[: math.prod(shape)].view(shape)
    piece.products.logits(chunk.take(piece.hidden).to(piece.dtype), piece.bias, logits)
    target = chunk.row(target)
    inside = (target >= start) & (target < start + shape[1])
    place = torch.where(target == IGNORE, IGNORE, torch.where(inside, target - start, 0))
    rows = getattr(piece.kernels, what.function)(logits.unsqueeze(0), place, chunk.rows(readout))
    return _placed(what.rows(*(x.squeeze(0) for x in rows)), inside.squeeze(0), start)


def _finished(rows: Rows, target: Tensor, vocab: int) -> Rows:
    """Rows of the whole vocabulary, with what stands for targets outside of it."""
    known = (target >= 0) & (target < vocab)
    rows = rows._replace(logp=torch.where(rows.lse == -torch.inf, torch.nan, rows.logp))
    values = (x.masked_fill(~known, torch.nan if x.is_floating_point() else -1) for x in rows)
    return type(rows)(*(x.masked_fill(target == IGNORE, 0) if x.is_floating_point() else x for x in values))


def _placed(piece: Rows, inside: Tensor, start: int) -> Rows:
    """A piece's rows as those of its place: logp -inf where the target is elsewhere, columns counted from the row's."""
    # In a piece of -inf throughout nothing has a distribution; in the row such a target has probability 0.
    piece = piece._replace(logp=torch.where(inside & (piece.lse != -torch.inf), piece.logp, -torch.inf))
    if isinstance(piece, RowObservations):
        return piece._replace(argmax=torch.where(piece.argmax < 0, -1, piece.argmax + start))
    return piece


def _shares(a: Rows, b: Rows, start: int, stop: int) -> tuple[Share, Share]:
    """Of the columns before ``start``, and of those from there to ``stop``.

    With w the probability of falling into a part, log w_a = log sigma(lse_a - lse_b), so that nothing of lse's size is
    rounded on the way.
    """
    nothing = torch.isneginf(b.lse)
    difference = torch.where(nothing, torch.inf, a.lse - b.lse)
    return Share(logsigmoid(difference), start / stop), Share(logsigmoid(-difference), (stop - start) / stop)


def _merge_stats(a: RowStats | RowObservations, b: RowStats | RowObservations, of_a: Share, of_b: Share) -> RowStats:
    """Statistics of a row from those of two parts of its vocabulary; logp -inf where the target is not in a part.

        lse = log(e^{lse_a} + e^{lse_b})        logp = logp_a + log w_a
        H = w_a (H_a - log w_a) + w_b (H_b - log w_b)

    (entropy's chain rule).
    """
    entropy = torch.zeros_like(a.entropy)
    for part, share in ((a, of_a.log_weight), (b, of_b.log_weight)):
        entropy += torch.where(torch.isneginf(share), 0, share.exp() * (part.entropy - share))
    logp = torch.maximum(a.logp + of_a.log_weight, b.logp + of_b.log_weight)
    return RowStats(logp, entropy, torch.logaddexp(a.lse, b.lse))


def _merge_observations(a: RowObservations, b: RowObservations, of_a: Share, of_b: Share) -> RowObservations:
    """Observations of a row from those of two parts of its vocabulary, a before b.

        log sum p^2 = log(w_a^2 e^{l_a} + w_b^2 e^{l_b})        mean = (n_a mean_a + n_b mean_b) / (n_a + n_b)

    and the argmax of the part with the larger logit, of a where they are equal.
    """
    squares = (
        torch.where(torch.isneginf(share), -torch.inf, part.log_sum_sq_probs + 2 * share)
        for part, share in ((a, of_a.log_weight), (b, of_b.log_weight))
    )
    later = (b.largest > a.largest) | b.largest.isnan()
    return RowObservations(
        *_merge_stats(a, b, of_a, of_b),
        torch.logaddexp(*squares).clamp(max=0),
        of_a.width * a.mean_logit + of_b.width * b.mean_logit,
        torch.maximum(a.largest, b.largest),
        torch.where(later, b.argmax, a.argmax),
    )


STATISTICS = Measurement("token_stats", RowStats, _merge_stats)
OBSERVATIONS = Measurement("token_observations", RowObservations, _merge_observations)
