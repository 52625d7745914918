"""Operators on hidden states and the weight of a linear head. ``head`` implements them.

Hidden states are [T, D] and per-row tensors [B, L], with B * L = T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import Measured, Observed, ProgramArgs, ReadoutArgs, RowGradients, RowMoments, RowStats
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.rows import measured_like, observed_like, row_like, stats_like


class HeadArgs(NamedTuple):
    """What makes logits: hidden W^T + b."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class SweepArgs(NamedTuple):
    """How chunks of logits are made."""

    dtype: torch.dtype  # of the matmuls' operands
    max_chunk_bytes: int | None  # see ``Plan``
    backend: str


class Wanted(NamedTuple):
    """Which gradients are wanted; what nobody asks for is not computed."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients(NamedTuple):
    """Those not wanted have no elements. fp32 for fp16, until the loss scale has multiplied them."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]


class FusedHead(NamedTuple):
    loss: Tensor  # []
    stats: RowStats
    gradients: HeadGradients


def kept_dtype(x: Tensor) -> torch.dtype:
    """Of the gradient of x until it has been multiplied by the loss scale."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _gradients_like(head: HeadArgs, wanted: Wanted) -> HeadGradients:
    (vocab, d), tokens = head.weight.shape, head.hidden.shape[0]
    of_bias = kept_dtype(head.weight if head.bias is None else head.bias)
    return HeadGradients(
        head.hidden.new_empty(tokens if wanted.hidden else 0, d, dtype=kept_dtype(head.hidden)),
        head.weight.new_empty(vocab if wanted.weight else 0, d, dtype=kept_dtype(head.weight)),
        head.weight.new_empty(vocab if wanted.bias else 0, dtype=of_bias),
    )


def _stats(head: HeadArgs, target: Tensor, readout: ReadoutArgs, sweep: SweepArgs) -> Measured:
    return measured_like(target, sweep.dtype)


def _observations(head: HeadArgs, target: Tensor, readout: ReadoutArgs, sweep: SweepArgs) -> Observed:
    return observed_like(target, sweep.dtype)


def backward(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    sweep: SweepArgs,
    wanted: Wanted,
) -> HeadGradients:
    return _gradients_like(head, wanted)


def _loss(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    kernel: str,
    sweep: SweepArgs,
    wanted: Wanted,
) -> FusedHead:
    loss = row_like(target, sweep.dtype).new_empty(())
    return FusedHead(loss, stats_like(target, sweep.dtype), _gradients_like(head, wanted))


# Each function is signature and fake in one.
linear_token_stats = Operator("linear_token_stats", _stats, _stats)
linear_token_observations = Operator("linear_token_observations", _observations, _observations)
linear_token_stats_backward = Operator("linear_token_stats_backward", backward, backward)
fused_linear_loss = Operator("fused_linear_loss", _loss, _loss)
