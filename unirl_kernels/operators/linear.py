"""Operators on hidden states and the weight of a linear head. ``head`` implements them.

Hidden states are [T, D] and per-row tensors [B, L], with B * L = T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import groups
from unirl_kernels.backends.groups import (
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowStats,
)
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.shards import Operators, Tiles, tiles_like


class HeadArgs(NamedTuple):
    """The inputs of logits = hidden W^T + b."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class SweepArgs(NamedTuple):
    """How chunks of logits are computed."""

    dtype: torch.dtype  # of the matmuls' operands
    max_chunk_bytes: int | None  # see ``Plan``
    backend: str


class Wanted(NamedTuple):
    """Which gradients are wanted; the others are not computed."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients(NamedTuple):
    """Gradients that are not wanted have no elements. For fp16 they are fp32, until multiplied by the loss scale."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]


class FusedHead(NamedTuple):
    loss: Tensor  # []
    stats: RowStats
    gradients: HeadGradients


def kept_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the gradient of x until it is multiplied by the loss scale."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _gradients_like(head: HeadArgs, wanted: Wanted) -> HeadGradients:
    (vocab, d), tokens = head.weight.shape, head.hidden.shape[0]
    of_bias = kept_dtype(head.weight if head.bias is None else head.bias)
    return HeadGradients(
        head.hidden.new_empty(tokens if wanted.hidden else 0, d, dtype=kept_dtype(head.hidden)),
        head.weight.new_empty(vocab if wanted.weight else 0, d, dtype=kept_dtype(head.weight)),
        head.weight.new_empty(vocab if wanted.bias else 0, dtype=of_bias),
    )


def _declared(function: Callable[..., Any]) -> Operator:
    """Decorator: an operator with these arguments. The function is its fake; ``head`` implements it."""
    return Operator(function.__name__, function, function)


@_declared
def linear_token_stats(head: HeadArgs, target: Tensor, readout: ReadoutArgs, sweep: SweepArgs) -> Measured:
    return groups.measured_like(target, sweep.dtype)


@_declared
def linear_token_observations(head: HeadArgs, target: Tensor, readout: ReadoutArgs, sweep: SweepArgs) -> Observed:
    return groups.observed_like(target, sweep.dtype)


def _backward(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    sweep: SweepArgs,
    wanted: Wanted,
) -> HeadGradients:
    return _gradients_like(head, wanted)


linear_token_stats_backward = Operator("linear_token_stats_backward", _backward, _backward)
linear_shard_stats_backward = Operator("linear_shard_stats_backward", _backward, _backward)


@_declared
def fused_linear_loss(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    kernel: str,
    sweep: SweepArgs,
    wanted: Wanted,
) -> FusedHead:
    loss = target.new_empty((), dtype=groups.row_dtype(sweep.dtype))
    return FusedHead(loss, RowStats._make(groups.rows_like(target, sweep.dtype, 3)), _gradients_like(head, wanted))


# Operators of a shard, whose targets may be ELSEWHERE. They use the chunks of the backward, which takes their moments.


@_declared
def linear_shard_moments(
    head: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, sweep: SweepArgs
) -> RowMoments:
    return tiles_like(target, sweep.dtype, tiles)


@_declared
def linear_shard_observations(
    head: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, sweep: SweepArgs
) -> Observed:
    return groups.observed_like(target, sweep.dtype)


LINEAR_STATISTICS = Operators(linear_token_stats, linear_shard_moments, in_tiles=True)
LINEAR_OBSERVATIONS = Operators(linear_token_observations, linear_shard_observations, in_tiles=False)
