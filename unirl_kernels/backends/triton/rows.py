"""Tuples for a row: its address, its target, and the readout that maps its logits to u and z.

Kernels first gather their arguments in these tuples. Tuples are not arguments of kernels: Triton would compile again
for every new length and stride in a tuple.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from unirl_kernels.backends.groups import ELSEWHERE as ELSEWHERE_TARGET
from unirl_kernels.backends.triton.scalar_math import LOG2E, divide, tanh
from unirl_kernels.batch import IGNORE as IGNORED_TARGET

IGNORE = tl.constexpr(IGNORED_TARGET)
ELSEWHERE = tl.constexpr(ELSEWHERE_TARGET)


class Matrix(NamedTuple):
    """A [B, L, V] tensor."""

    x: tl.tensor  # pointer to its first element
    length: tl.tensor  # L
    sequence: tl.tensor  # elements from one sequence to the next
    token: tl.tensor  # elements from one row to the next


class Row(NamedTuple):
    """A row of logits, or a slice of it."""

    x: tl.tensor  # pointer to its first column
    size: tl.tensor  # number of columns
    target: tl.tensor  # the target's column; outside of [0, size) if another part of the row has it


class Readout(NamedTuple):
    """z = kappa u."""

    inner: tl.tensor  # du/dx at x = 0: 1; -1 for a negative scale; the slope of tanh's argument with a softcap
    kappa: tl.tensor
    rate: tl.tensor  # kappa log2(e)


class Readouts(NamedTuple):
    """The arguments from which the readout of each row is computed."""

    inner: tl.tensor  # du/dx at x = 0, as in ``Readout``
    factor: tl.tensor  # kappa, or kappa times the row's temperature
    row_temperature: tl.tensor  # [B, L], or None


class Call(NamedTuple):
    """The arguments of a one-pass kernel."""

    logits: Matrix
    d_logits: Matrix
    size: tl.tensor  # V
    target: tl.tensor  # [B, L]
    readouts: Readouts
    fields: tl.tensor  # [FIELDS, B, L]
    parameters: tl.tensor  # [n_params]
    results: tl.tuple  # loss, logp, entropy, lse; [B, L] each


@triton.jit
def start_of_row(of: Matrix, row: tl.tensor) -> tl.tensor:
    """Pointer to row b * L + l of [B, L, V]. 64 bits: T V may exceed 2^31."""
    sequence, token = row // of.length, row % of.length
    return of.x + sequence.to(tl.int64) * of.sequence + token.to(tl.int64) * of.token


@triton.jit
def readout_of(readouts: Readouts, row: tl.tensor, COMPUTE: tl.constexpr) -> Readout:
    """The readout of a row; NaN if its temperature is not positive."""
    kappa = tl.full((), readouts.factor, COMPUTE)
    if readouts.row_temperature is not None:
        temperature = tl.load(readouts.row_temperature + row).to(COMPUTE)
        kappa = divide(kappa, tl.where(temperature > 0, temperature, float("nan")))
    return Readout(tl.full((), readouts.inner, COMPUTE), kappa, kappa * LOG2E)


@triton.jit
def is_computed(target: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Whether the row of a target is read: the target is one of ``size`` columns, or in another shard."""
    return ((target >= 0) & (target < size)) | (target == ELSEWHERE)


@triton.jit
def absent(target: tl.tensor, COMPUTE: tl.constexpr) -> tl.tensor:
    """The result for a row that is not read: 0 if it is ignored, NaN if its target is out of range."""
    return tl.where(target == IGNORE, 0.0, float("nan")).to(COMPUTE)


@triton.jit
def column_of(target: tl.tensor) -> tl.tensor:
    """Column of a target, int32; -1 if it is in another shard."""
    return tl.where(target == ELSEWHERE, -1, target).to(tl.int32)


@triton.jit
def u_of(x: tl.tensor, readout: Readout, READOUT: tl.constexpr) -> tl.tensor:
    """u, which increases with z: the logit x, -x for a negative scale, or tanh(inner x) with a softcap."""
    if READOUT == "softcap":
        return tanh(x * readout.inner)
    elif READOUT == "negated":
        return -x
    else:
        return x


@triton.jit
def u_of_target(row: Row, readout: Readout, READOUT: tl.constexpr) -> tl.tensor:
    """u of the target; -inf if the row does not have the target's column."""
    here = (row.target >= 0) & (row.target < row.size)
    x = tl.load(row.x + row.target, mask=here, other=0.0).to(readout.rate.dtype)
    return tl.where(here, u_of(x, readout, READOUT), float("-inf"))


@triton.jit
def slope(u: tl.tensor, outer: tl.tensor, READOUT: tl.constexpr) -> tl.tensor:
    """dz/dx; ``outer`` is its value at x = 0."""
    if READOUT == "softcap":
        return outer * ((1.0 - u) * (1.0 + u))
    else:
        return outer


@triton.jit
def row_fields(fields: tl.tensor, row: tl.tensor, rows: tl.tensor, FIELDS: tl.constexpr) -> tl.tuple:
    """The fields of a row, from [FIELDS, rows]."""
    values: tl.tuple = ()
    for i in tl.static_range(FIELDS):
        values = values + (tl.load(fields + i * rows.to(tl.int64) + row),)  # type: ignore  # noqa: RUF005
    return values


@triton.jit
def write(tensors: tl.tuple, row: tl.tensor, values: tl.tuple) -> None:
    """Write a row's entry of each tensor."""
    for i in tl.static_range(len(tensors)):
        tl.store(tensors[i] + row, values[i])


@triton.jit
def write_to_all(tensors: tl.tuple, row: tl.tensor, value: tl.tensor) -> None:
    """Write the same value as a row's entry of each tensor."""
    for i in tl.static_range(len(tensors)):
        tl.store(tensors[i] + row, value)
