"""Statistics of each token's row from tiles of logits, tokens by vocabulary, none of which is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unirl_kernels.backends import RowStats
from unirl_kernels.batch import IGNORE
from unirl_kernels.head.chunks import by_tokens, chunk_bytes
from unirl_kernels.head.sweep import Head

TOKENS_OF_TILE = 1024
"""Enough for a matrix product to run at full speed; the rest of a tile's memory goes into its width."""


def statistics(head: Head, target: Tensor, readout: Sequence[Any], max_chunk_bytes: int | None) -> RowStats:
    """logp, entropy and lse, [T] each; 0 where the target is ``IGNORE``, NaN where it is otherwise outside [0, V).

    Args:
        head: what makes the logits.
        target: [T].
        readout: scale, softcap, temperature, temperature per row [T] or None.
        max_chunk_bytes: memory for a tile; None for the default.
    """
    *scalars, row_temperature = readout
    logits = max(1, chunk_bytes(head.weight.device, max_chunk_bytes) // head.row_dtype.itemsize)
    chunks = by_tokens(target, min(TOKENS_OF_TILE, logits))
    width = min(max(1, logits // TOKENS_OF_TILE), head.weight.shape[0])
    tile = head.empty(max((chunk.n for chunk in chunks), default=0) * width)
    results = RowStats(*(head.hidden.new_zeros(target.shape, dtype=head.row_dtype) for _ in RowStats._fields))
    for chunk in chunks:
        rows = chunk.take(head.hidden).to(head.dtype)
        temperature = None if row_temperature is None else chunk.row(row_temperature)
        stats = _across(head, rows, chunk.take(target), tile, width, (*scalars, temperature, head.backend))
        for whole, part in zip(results, stats, strict=True):
            chunk.put(whole, part)
    return results


def _across(head: Head, hidden: Tensor, target: Tensor, tile: Tensor, width: int, args: Sequence[Any]) -> RowStats:
    """The statistics of a few rows, the vocabulary in pieces of ``width``."""
    n, vocab = len(hidden), head.weight.shape[0]
    ignored = target == IGNORE
    merged = None
    for start in range(0, vocab, width):
        words = slice(start, min(start + width, vocab))
        logits = tile[: n * (words.stop - start)].view(n, -1)
        bias = None if head.bias is None else head.bias[words]
        head.kernels.products(head.weight[words], head.dtype).logits(hidden, bias, logits)
        inside = (target >= start) & (target < words.stop)
        place = torch.where(ignored, IGNORE, torch.where(inside, target - start, 0))
        logp, entropy, lse = (x.squeeze(0) for x in torch.ops.unirl.token_stats(logits[None], place[None], *args))
        # In a piece of -inf throughout nothing has a distribution; in the row such a target has probability 0.
        piece = RowStats(torch.where(inside & (lse != -torch.inf), logp, -torch.inf), entropy, lse)
        merged = piece if merged is None else _merge(merged, piece)
    assert merged is not None
    known = (target >= 0) & (target < vocab)
    merged = merged._replace(logp=torch.where(merged.lse == -torch.inf, torch.nan, merged.logp))
    values = (torch.where(known, x, torch.nan) for x in merged)
    return RowStats(*(torch.where(ignored, 0.0, x) for x in values))


def _merge(a: RowStats, b: RowStats) -> RowStats:
    """Statistics of a row from those of two parts of its vocabulary; logp -inf where the target is not in a part.

    With w the probability of falling into a part, log w_a = log sigma(lse_a - lse_b):

        lse = log(e^{lse_a} + e^{lse_b})        logp = logp_a + log w_a
        H = w_a (H_a - log w_a) + w_b (H_b - log w_b)

    (entropy's chain rule), so that nothing of lse's size is rounded on the way.
    """
    nothing = torch.isneginf(b.lse)
    difference = torch.where(nothing, torch.inf, a.lse - b.lse)
    shares = logsigmoid(difference), logsigmoid(-difference)
    entropy = torch.zeros_like(a.entropy)
    for part, share in zip((a, b), shares, strict=True):
        entropy += torch.where(torch.isneginf(share), 0, share.exp() * (part.entropy - share))
    logp = torch.maximum(a.logp + shares[0], b.logp + shares[1])
    return RowStats(logp, entropy, torch.logaddexp(a.lse, b.lse))
