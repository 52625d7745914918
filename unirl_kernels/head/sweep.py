"""Chunk after chunk: logits, their gradient, and the gradients of what made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unirl_kernels.backends import Backend, load
from unirl_kernels.backends.matmuls import Matmuls, NoColumns
from unirl_kernels.collectives import Group, start_all_reduce, wait
from unirl_kernels.head.chunks import Chunk, rows_per_chunk
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted, kept_dtype


@dataclass(frozen=True, eq=False)
class Head:
    """What makes logits.

    Args:
        hidden: [T, D].
        weight: [V, D].
        bias: [V] or None.
        dtype: of the matmuls' operands.
        backend: name of the one that multiplies, and whose row kernels work on the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    backend: str

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def kernels(self) -> Backend:
        return load(self.backend)

    @classmethod
    def of(cls, head: HeadArgs, sweep: SweepArgs) -> Head:
        return cls(*head, sweep.dtype, sweep.backend)

    @cached_property
    def matmuls(self) -> Matmuls:
        if not self.weight.shape[0]:
            return NoColumns(self.weight)
        return self.kernels.matmuls(self.weight, self.dtype)

    def columns(self, start: int, stop: int) -> Head:
        """The head of a part of the vocabulary."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)

    def rows_per_chunk(self, max_chunk_bytes: int | None) -> int:
        return rows_per_chunk(self.matmuls.row_bytes, self.weight.device, max_chunk_bytes)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised memory of the rows' dtype."""
        return self.kernels.empty(shape, self.row_dtype, self.weight.device)


class AtOnce:
    """Writes the gradient of the hidden states of a chunk where it belongs."""

    def put(self, chunk: Chunk, d_hidden: Tensor, part: Tensor) -> None:
        chunk.put(d_hidden, part)

    def finish(self) -> None:
        """Write what has not been written."""


class Summed(AtOnce):
    """The same of its sum over ranks, which is formed in fp32 while the next chunk is worked on.

    Args:
        ranks: each of which has a part of the weight.
    """

    def __init__(self, ranks: Group) -> None:
        self._ranks = ranks
        self._started: list[tuple[Chunk, Tensor, Tensor]] = []

    def put(self, chunk: Chunk, d_hidden: Tensor, part: Tensor) -> None:
        started = start_all_reduce(part, self._ranks)
        self.finish()
        self._started.append((chunk, d_hidden, started))

    def finish(self) -> None:
        while self._started:
            chunk, d_hidden, total = self._started.pop()
            chunk.put(d_hidden, wait(total))


def sweep(
    head: Head,
    chunks: Sequence[Chunk],
    work: Callable[[Tensor, Tensor, int], None],
    wanted: Wanted,
    of_hidden: AtOnce = AtOnce(),
) -> HeadGradients:
    """Make the logits of each chunk, let ``work`` find their gradient, and form the other gradients from it.

    Three matmuls per token in all, two or one where fewer gradients are wanted.

    Args:
        head: what makes the logits.
        chunks: of the T tokens.
        work: gets the logits of a chunk, [1, n, V] fp32 (fp64 for fp64), memory for their gradient, which is their own
            or has the dtype that is multiplied, and the chunk's number.
        wanted: which gradients.
        of_hidden: what becomes of the gradient of a chunk's hidden states.

    Returns:
        ``HeadGradients`` in the dtypes of hidden states, weight and bias, but fp32 for fp16, which holds the gradients
        of single tokens only after a loss scale; zero at tokens in no chunk.
    """
    vocab, d = head.weight.shape
    tokens = head.hidden.shape[0] if wanted.hidden else 0
    d_hidden = head.hidden.new_zeros(tokens, d, dtype=kept_dtype(head.hidden))
    d_weight = head.empty(vocab if wanted.weight else 0, d)
    d_bias = head.weight.new_zeros(vocab if wanted.bias else 0, dtype=head.row_dtype)
    logits_of_largest = head.empty(max((chunk.n for chunk in chunks), default=0), vocab)
    d_logits_of_largest = head.matmuls.gradient_buffer(logits_of_largest)
    for k, chunk in enumerate(chunks):
        hidden = chunk.take(head.hidden).to(head.dtype)
        logits, d_logits = logits_of_largest[: chunk.n], d_logits_of_largest[: chunk.n]
        head.matmuls.logits(hidden, head.bias, logits)
        work(logits.unsqueeze(0), d_logits.unsqueeze(0), k)
        if wanted.hidden:
            of_hidden.put(chunk, d_hidden, head.matmuls.d_hidden(d_logits))
        if wanted.weight:
            head.matmuls.add_d_weight(d_logits, hidden, d_weight, first=k == 0)
        if wanted.bias:
            d_bias += d_logits.sum(0, dtype=d_bias.dtype)
    of_hidden.finish()
    if not chunks:
        d_weight.zero_()
    d_bias = d_bias if head.bias is None else d_bias.to(kept_dtype(head.bias))
    return HeadGradients(d_hidden, d_weight.to(kept_dtype(head.weight)), d_bias)
