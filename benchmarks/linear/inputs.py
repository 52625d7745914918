"""Random hidden states and a weight whose logits look like a trained model's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.inputs import SUREST, Inputs, ignore_last, random_numbers
from benchmarks.work import DTYPES, Work
from unirl_kernels.testing import oracle

SPREAD = 2
"""Standard deviation of the logits other than the target's."""
CHUNK_BYTES = 2**28
"""The number of logits in a chunk. Each chunk reads the whole weight, so small chunks take more time."""


def make(work: Work) -> Inputs:
    """Hidden states, [B, L, D], and the weight, [V, D], with a batch around them.

    A hidden state is normal, plus as much of its target's row of the weight as raises that logit.
    """
    assert work.hidden is not None
    draw, dtype = random_numbers(work), DTYPES[work.dtype]
    shape = (work.sequences, work.length)
    target = torch.randint(0, work.vocab, shape, **draw)
    weight = torch.empty(work.vocab, work.hidden, dtype=dtype, device=draw["device"])
    weight.normal_(0, SPREAD / work.hidden**0.5, generator=draw["generator"])
    rows = weight[target].float()
    bonus = torch.randint(0, SUREST, (*shape, 1), **draw)
    hidden = torch.randn(*shape, work.hidden, **draw) + bonus * rows / rows.square().sum(-1, keepdim=True)
    hidden = hidden.to(dtype)
    ignore_last(work, target)
    logp = target.new_empty(target.shape, dtype=torch.float32)
    for positions, logits in chunks(hidden, weight, torch.float32):
        logp.view(-1)[positions] = oracle.log_probs(logits, target.flatten()[positions])
    return Inputs.around(work, (hidden, weight), target, logp, draw)


def chunks(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Logits, [n, V], in ``dtype`` arithmetic, of a slice of the flat positions at a time.

    Args:
        hidden: [B, L, D].
        weight: [V, D].
        dtype: of the matmuls and their operands.
    """
    rows, weight = hidden.flatten(0, -2), weight.to(dtype)
    at_once = max(1, CHUNK_BYTES // (weight.shape[0] * dtype.itemsize))
    for start in range(0, len(rows), at_once):
        positions = slice(start, min(start + at_once, len(rows)))
        yield positions, rows[positions].to(dtype) @ weight.t()
