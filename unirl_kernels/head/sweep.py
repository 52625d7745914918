"""The sweep over chunks: logits, their gradient, and the gradients of hidden, weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unirl_kernels.backends import Backend, load
from unirl_kernels.backends.groups import row_dtype
from unirl_kernels.backends.matmuls import Matmuls, NoColumns
from unirl_kernels.head.chunks import (
    Chunk,
    by_sizes,
    chunk_bytes,
    counted_tokens,
    evenly,
    joined,
    rows_per_chunk,
)
from unirl_kernels.head.sizes import Shape, Sizes, multiprocessors, sizes_of, waves
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted, kept_dtype
from unirl_kernels.ranks.collectives import Group, start_all_reduce, wait


@dataclass(frozen=True, eq=False)
class Head:
    """``HeadArgs`` and ``SweepArgs`` in one."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    dtype: torch.dtype  # of the matmuls' operands
    backend: str  # for the matmuls and the row kernels
    max_chunk_bytes: int | None = None

    @property
    def row_dtype(self) -> torch.dtype:
        return row_dtype(self.dtype)

    @property
    def kernels(self) -> Backend:
        return load(self.backend)

    @classmethod
    def of(cls, head: HeadArgs, sweep: SweepArgs) -> Head:
        return cls(*head, sweep.dtype, sweep.backend, sweep.max_chunk_bytes)

    @cached_property
    def matmuls(self) -> Matmuls:
        if not self.weight.shape[0]:
            return NoColumns(self.weight)
        return self.kernels.matmuls(self.weight, self.dtype)

    @property
    def row_bytes(self) -> int:
        """Memory for the logits of one token and their gradient."""
        # Of one column of the weight: under autocast, matmuls convert theirs.
        return replace(self, weight=self.weight[:, :1]).matmuls.row_bytes

    def columns(self, start: int, stop: int) -> Head:
        """The head of a part of the vocabulary."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)

    @property
    def chunk_bytes(self) -> int:
        """Memory for the logits of one chunk."""
        return chunk_bytes(self.weight.device, self.max_chunk_bytes)

    def rows_per_chunk(self) -> int:
        """The number of tokens whose logits and gradient fit the memory of a chunk."""
        return rows_per_chunk(self.row_bytes, self.weight.device, self.max_chunk_bytes)

    def groups(self, target: Tensor) -> list[list[Chunk]]:
        """The valid tokens in chunks that may be cut anywhere, and the chunks in groups, see ``sweep_chunks``."""
        counted, n = counted_tokens(target.reshape(-1))
        sizes = self._sizes(n)
        if sizes is not None:
            return by_sizes(counted, n, sizes)
        return [[chunk] for chunk in evenly(counted, n, self.rows_per_chunk())]

    def _sizes(self, tokens: int) -> Sizes | None:
        """Two sizes, if the gradient of the logits has separate memory and there is enough memory."""
        gradient = self.matmuls.gradient_bytes
        if not gradient:
            return None
        vocab, d = self.weight.shape
        logits, processors = vocab * self.row_dtype.itemsize, multiprocessors(self.weight.device)
        return sizes_of(Shape(tokens, vocab, d, logits, gradient, self.chunk_bytes, processors))

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised memory of the rows' dtype."""
        return self.kernels.empty(shape, self.row_dtype, self.weight.device)


class AtOnce:
    """Writes the gradient of a chunk's hidden states to d_hidden."""

    def put(self, chunk: Chunk, d_hidden: Tensor, part: Tensor) -> None:
        chunk.put(d_hidden, part)

    def finish(self) -> None:
        """Write what is still outstanding."""


class Summed(AtOnce):
    """Writes the sum of that gradient over ranks. It is summed in fp32 while the next chunk is computed."""

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


def sweep_chunks(
    head: Head,
    groups: Sequence[Sequence[Chunk]],
    work: Callable[[Tensor, Tensor, Chunk], None],
    wanted: Wanted,
    of_hidden: AtOnce = AtOnce(),
) -> HeadGradients:
    """For each chunk compute the logits, call ``work`` to compute their gradient, and compute the other gradients from
    it.

    Three matmuls per token; two or one if fewer gradients are wanted. Tokens in no chunk have zero gradients.

    Args:
        head: the head.
        groups: groups of chunks of the T tokens. The logits of one chunk exist at a time. Their gradients are kept for
            the chunks of one group, and then multiplied in one matmul.
        work: called with the logits of a chunk, [1, n, V] fp32 (fp64 for fp64); memory for their gradient, which is the
            logits themselves or has the dtype of the matmuls; and the chunk.
        wanted: which gradients.
        of_hidden: writes the gradient of a chunk's hidden states.
    """
    vocab, d = head.weight.shape
    tokens = head.hidden.shape[0] if wanted.hidden else 0
    d_hidden = head.hidden.new_zeros(tokens, d, dtype=kept_dtype(head.hidden))
    d_weight = _memory_of_d_weight(head, vocab if wanted.weight else 0, d, len(groups))
    d_bias = head.weight.new_zeros(vocab if wanted.bias else 0, dtype=head.row_dtype)
    logits_of_largest = head.empty(max((chunk.n for group in groups for chunk in group), default=0), vocab)
    together = [joined(group) for group in groups]
    gradient = head.matmuls.gradient_buffer(logits_of_largest, max((whole.n for whole in together), default=0))
    for number, whole in enumerate(together):
        hidden, done = whole.take(head.hidden).to(head.dtype), 0
        for chunk in groups[number]:
            logits, d_logits = logits_of_largest[: chunk.n], gradient[done : done + chunk.n]
            head.matmuls.logits(hidden[done : done + chunk.n], head.bias, logits)
            work(logits.unsqueeze(0), d_logits.unsqueeze(0), chunk)
            done += chunk.n
        d_logits = gradient[:done]
        if wanted.hidden:
            of_hidden.put(whole, d_hidden, head.matmuls.d_hidden(d_logits))
        if wanted.weight:
            head.matmuls.add_d_weight(d_logits, hidden, d_weight, first=number == 0)
        if wanted.bias:
            d_bias += d_logits.sum(0, dtype=d_bias.dtype)
    of_hidden.finish()
    if not groups:
        d_weight.zero_()
    d_bias = d_bias.to(kept_dtype(head.weight if head.bias is None else head.bias))
    return HeadGradients(d_hidden, d_weight.to(kept_dtype(head.weight)), d_bias)


def _memory_of_d_weight(head: Head, vocab: int, d: int, groups: int) -> Tensor:
    """Memory for d_weight: in the returned dtype if one matmul computes all of it and the device rounds, else in the
    dtype of the sums over groups."""
    dtype = kept_dtype(head.weight)
    rounded = groups == 1 and head.matmuls.rounds and dtype == head.dtype
    # A matmul with few tiles may split the tokens over multiprocessors and add the parts in 16 bits.
    rounded = rounded and waves(vocab, d, multiprocessors(head.weight.device)) > 1
    return head.kernels.empty((vocab, d), dtype if rounded else head.row_dtype, head.weight.device)
