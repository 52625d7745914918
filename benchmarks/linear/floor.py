"""The lower bound of the time of work on a linear head: its matmuls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.buffers import Ring
from benchmarks.work import DTYPES, Work

MATMULS_OF_GRADIENTS = 3
"""Logits and two gradients. If a provider computes the logits twice, they count once."""


def floor(work: Work) -> dict[str, int]:
    """Operations that count for every provider: 2 T D V for each matmul."""
    assert work.hidden is not None
    matmuls = MATMULS_OF_GRADIENTS if work.has_gradient else 1
    return {"flops": matmuls * 2 * work.tokens * work.hidden * work.vocab}


def gradient_bytes(work: Work) -> int:
    """Bytes of the gradients of hidden and weight; 0 if none is computed."""
    assert work.hidden is not None
    return (work.tokens + work.vocab) * work.hidden * DTYPES[work.dtype].itemsize if work.has_gradient else 0


def baselines(work: Work, rings: Sequence[Ring]) -> dict[str, Callable[[], object]]:
    """The bare matmuls, in the dtype of the operands. Their results are written to existing memory."""
    return {"matmuls": BareMatmuls(work, rings)}


class BareMatmuls:
    """logits = h W^T, and with gradients d W and d^T h. The logits stand in for d, which has their shape.

    Args:
        work: the work.
        rings: of hidden states and weight.
    """

    def __init__(self, work: Work, rings: Sequence[Ring]) -> None:
        self._work, self._rings = work, rings
        self._outputs: tuple[Tensor, ...] | None = None

    def __call__(self) -> None:
        hidden, weight = (ring.take() for ring in self._rings)
        hidden = hidden.flatten(0, 1)
        if self._outputs is None:  # before the first timed call: checks need the memory
            self._outputs = tuple(x.new_empty(*shape) for x, shape in self._shapes(hidden, weight))
        logits, d_hidden, d_weight = self._outputs
        torch.mm(hidden, weight.t(), out=logits)
        if self._work.has_gradient:
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)

    def _shapes(self, hidden: Tensor, weight: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
        gradients = [(x, tuple(x.shape) if self._work.has_gradient else (0,)) for x in (hidden, weight)]
        return [(hidden, (len(hidden), len(weight))), *gradients]
