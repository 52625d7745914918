"""Random logits, and log-probabilities computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.inputs import SUREST, Inputs, ignore_last, random_numbers
from benchmarks.work import DTYPES, Work
from unirl_kernels.testing import oracle

CHUNK_BYTES = 2**26


def make(work: Work) -> Inputs:
    """Logits, [B, L, V], peaked as a trained model's, with a batch around them."""
    draw = random_numbers(work)
    shape = (work.sequences, work.length)
    target = torch.randint(0, work.vocab, shape, **draw)
    logits = torch.empty(*shape, work.vocab, dtype=DTYPES[work.dtype], device=draw["device"])
    logits.normal_(0, 2, generator=draw["generator"])
    bonus = torch.randint(0, SUREST, (*shape, 1), **draw).to(logits.dtype)
    logits.scatter_add_(-1, target.unsqueeze(-1), bonus)
    ignore_last(work, target)
    return Inputs.around(work, (logits,), target, log_probs(logits, target, torch.float32), draw)


def log_probs(logits: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """log pi(o_t), [B, L], in ``dtype`` arithmetic, a few rows at a time."""
    rows, flat = logits.flatten(0, 1), target.flatten()
    at_once = max(1, CHUNK_BYTES // (rows.shape[-1] * dtype.itemsize))
    pairs = zip(rows.split(at_once), flat.split(at_once), strict=True)
    return torch.cat([oracle.log_probs(x.to(dtype), y) for x, y in pairs]).view(target.shape)
