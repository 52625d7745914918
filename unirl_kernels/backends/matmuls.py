"""The three matmuls of a linear head, with fp32 results for operands of any dtype (fp64 for fp64).

    logits = hidden W^T + b        d_hidden = d_logits W        d_W = d_logits^T hidden

Results are never rounded to 16 bits: rounded logits have changed log-probabilities by up to 0.06.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

SLICE_BYTES = 2**24
"""Bytes of the part of the weight that is converted to fp32 at a time, on a device that cannot multiply 16-bit operands
into fp32."""

SLICES_OF_HALVES_BYTES = 2**28
"""Bytes of the two bf16 halves of the part of the weight that is converted at a time."""


@dataclass(frozen=True, eq=False)
class Matmuls:
    """The matmuls of one weight. ``hidden`` is [n, D] in the operands' dtype; results are fp32."""

    weight: Tensor  # [V, D]

    repeatable: ClassVar[bool] = False
    """Whether the bits of a logit do not depend on the other tokens and columns of the matmul."""

    rounds: ClassVar[bool] = False
    """Whether the first ``add_d_weight`` may write to memory of the operands' dtype, rounded once."""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a row of the logits' gradient; 0 if it overwrites the logits."""
        return 0

    @property
    def row_bytes(self) -> int:
        """Bytes of the logits of one token and of their gradient."""
        return 4 * self.weight.shape[0] + self.gradient_bytes

    def gradient_buffer(self, logits: Tensor, rows: int) -> Tensor:
        """[rows, V] for gradients of logits, in the dtype of the matmuls; the logits' own memory if that has this
        dtype."""
        return logits

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Write [n, V] = hidden W^T + b."""
        raise NotImplementedError

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        """[n, D] = d_logits W."""
        raise NotImplementedError

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        """Add d_logits^T hidden to ``total``, [V, D]; the first time, write it."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Mixed(Matmuls):
    """Matmuls of a device that multiplies 16-bit operands into fp32. The gradient of the logits is such an operand."""

    rounds: ClassVar[bool] = True

    @property
    def gradient_bytes(self) -> int:
        return self.weight.itemsize * self._row

    @property
    def _row(self) -> int:
        """V, rounded up so that each row of a gradient starts at a multiple of 16 bytes, as tensor cores need."""
        step = 16 // self.weight.itemsize
        return -(-self.weight.shape[0] // step) * step

    def gradient_buffer(self, logits: Tensor, rows: int) -> Tensor:
        return self.weight.new_empty(rows, self._row)[:, : logits.shape[1]]

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _write_logits(hidden, self.weight, bias, out)

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        return torch.mm(d_logits, self.weight, out_dtype=torch.float32)

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        if total.dtype == d_logits.dtype:
            torch.mm(d_logits.t(), hidden, out=total)
        else:
            torch.addmm(total, d_logits.t(), hidden, beta=0 if first else 1, out_dtype=torch.float32, out=total)


@dataclass(frozen=True, eq=False)
class Halved(Matmuls):
    """Matmuls of a device that multiplies 16-bit operands into fp32 results, for fp16 operands.

    The gradient of the logits stays in fp32, since the gradient of a single token is too small for fp16. It is split
    into a sum of two bf16 numbers, since bf16 has the range of fp32. An fp16 operand is exactly a sum of two bf16
    numbers. Of the four matmuls of the halves the smallest, 2^-16 of the whole, is left out. This makes seven matmuls
    on tensor cores instead of three in fp32 without them. Errors are within 2^-15 of the sum of the magnitudes.
    """

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        _write_logits(hidden, self.weight, bias, out)

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        total = d_logits.new_zeros(d_logits.shape[0], self.weight.shape[1])
        for rows in self._slices():
            _add_product(total, _halves(d_logits[:, rows]), _halves(self.weight[rows]))
        return total

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        if first:
            total.zero_()
        halves = _halves(hidden)
        for rows in self._slices():
            high, low = _halves(d_logits[:, rows])
            _add_product(total[rows], (high.t(), low.t()), halves)

    def _slices(self) -> Iterator[slice]:
        """Parts of the vocabulary, so small that their halves take little memory."""
        vocab, d = self.weight.shape
        step = max(128, SLICES_OF_HALVES_BYTES // (4 * d) // 128 * 128)
        for start in range(0, vocab, step):
            yield slice(start, min(start + step, vocab))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two bf16 numbers: within 2^-16, and exact if x is fp16."""
    high = x.to(torch.bfloat16)
    return high, (x.to(torch.float32) - high).to(torch.bfloat16)


def _add_product(total: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    """Add (a0 + a1) (b0 + b1) to an fp32 matrix, without a1 b1; the smallest matmul first."""
    for left, right in ((a[1], b[0]), (a[0], b[1]), (a[0], b[0])):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _write_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write hidden W^T + b in fp32, from 16-bit operands."""
    if bias is None:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        # The bias as a matrix: with out_dtype, torch had a bug with a vector (pytorch/pytorch#154086).
        out.copy_(bias)
        torch.addmm(out, hidden, weight.t(), out_dtype=torch.float32, out=out)


@dataclass(frozen=True, eq=False)
class Widened(Matmuls):
    """Matmuls of fp32 or fp64 operands; 16-bit ones are converted, a slice of the vocabulary at a time."""

    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.weight.shape[0] * self._wide_dtype.itemsize

    @property
    def _wide_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(self._wide_dtype)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        vocab, d = self.weight.shape
        converted = not self.weight.dtype == self.dtype == self._wide_dtype
        step = max(1, SLICE_BYTES // (4 * d)) if converted else vocab
        for start in range(0, vocab, step):
            rows = slice(start, min(start + step, vocab))
            yield rows, self._wide(self.weight[rows])

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        hidden = self._wide(hidden)
        for rows, weight in self._slices():
            if bias is None:
                torch.mm(hidden, weight.t(), out=out[:, rows])
            else:
                torch.addmm(bias[rows].to(out.dtype), hidden, weight.t(), out=out[:, rows])

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        total = d_logits.new_zeros(d_logits.shape[0], self.weight.shape[1])
        for rows, weight in self._slices():
            total.addmm_(d_logits[:, rows], weight)
        return total

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        total.addmm_(d_logits.t(), self._wide(hidden), beta=0 if first else 1)


@dataclass(frozen=True, eq=False)
class NoColumns(Matmuls):
    """Matmuls of a shard without columns, which matmul libraries may not support."""

    repeatable: ClassVar[bool] = True

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Nothing to write."""

    def d_hidden(self, d_logits: Tensor) -> Tensor:
        return d_logits.new_zeros(d_logits.shape[0], self.weight.shape[1])

    def add_d_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        """Nothing to add."""
