"""The implementations of the operators of linear heads: chunks of logits, and row kernels on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends.groups import (
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowStats,
)
from unirl_kernels.head.chunks import Chunk, without_ignored
from unirl_kernels.head.statistics import (
    measured_in_tiles,
    moments_in_chunks,
    no_rows,
    observed_in_chunks,
    observed_in_tiles,
)
from unirl_kernels.head.sweep import Head, sweep_chunks
from unirl_kernels.operators import linear
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.linear import FusedHead, HeadArgs, HeadGradients, SweepArgs, Wanted
from unirl_kernels.operators.rows import check_targets
from unirl_kernels.operators.shards import Tiles, no_columns


def _implements(operator: Operator) -> Callable[[Callable[..., Any]], None]:
    """Decorator: the implementation of an operator. It runs without autocast, which would convert the operands
    again."""

    def declare(function: Callable[..., Any]) -> None:
        def run(head: HeadArgs, *rest: object) -> Any:
            with torch.autocast(head.hidden.device.type, enabled=False):
                return function(head, *rest)

        operator.implementation(run)

    return declare


@_implements(linear.linear_token_stats)
def _token_stats(head: HeadArgs, target: Tensor, readout: ReadoutArgs, sweep: SweepArgs) -> Measured:
    return measured_in_tiles(_checked(head, target, sweep), target, readout)


@_implements(linear.linear_token_observations)
def _token_observations(head: HeadArgs, target: Tensor, readout: ReadoutArgs, sweep: SweepArgs) -> Observed:
    return observed_in_tiles(_checked(head, target, sweep), target, readout)


def _checked(head: HeadArgs, target: Tensor, sweep: SweepArgs) -> Head:
    check_targets(target, head.weight.shape[0])
    chunked = Head.of(head, sweep)
    if sweep.max_chunk_bytes is not None:
        chunked.rows_per_chunk()  # raise here, not in the backward, if the memory is too small
    return chunked


@_implements(linear.linear_token_stats_backward)
def _token_stats_backward(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    sweep: SweepArgs,
    wanted: Wanted,
) -> HeadGradients:
    # If the bits of the logits differ, these moments give probabilities that do not add up to 1: at a low temperature
    # the error is some percent. So without repeatable matmuls each chunk is measured again.
    known = moments if Head.of(head, sweep).matmuls.repeatable else None
    return _stats_backward(head, target, readout, known, gradients, sweep, wanted)


def _stats_backward(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments | None,
    gradients: RowGradients,
    sweep: SweepArgs,
    wanted: Wanted,
) -> HeadGradients:
    """The gradients of a head from those of the statistics. Without moments, each chunk computes them again."""
    chunked = _swept(head, target, sweep)

    def work(logits: Tensor, d_logits: Tensor, chunk: Chunk) -> None:
        of_rows = chunk.row(target), chunk.rows(readout)
        known = chunked.kernels.token_stats(logits, *of_rows).moments if moments is None else chunk.rows(moments)
        chunked.kernels.token_stats_backward(logits, *of_rows, known, chunk.rows(gradients), d_logits)

    return sweep_chunks(chunked, chunked.groups(target), work, wanted)


def _swept(head: HeadArgs, target: Tensor, sweep: SweepArgs) -> Head:
    """A head for a sweep that computes gradients. While a CUDA graph is recorded, the hidden states of ignored tokens
    are 0."""
    return Head.of(head._replace(hidden=without_ignored(head.hidden, target.reshape(-1))), sweep)


@_implements(linear.fused_linear_loss)
def _fused_loss(
    head: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    kernel: str,
    sweep: SweepArgs,
    wanted: Wanted,
) -> FusedHead:
    check_targets(target, head.weight.shape[0])
    chunked = _swept(head, target, sweep)
    losses: list[Tensor] = []
    (stats,) = no_rows(target, chunked, RowStats)

    def work(logits: Tensor, d_logits: Tensor, chunk: Chunk) -> None:
        of_rows = chunk.row(target), chunk.rows(readout), chunk.program(program)
        rows = chunked.kernels.fused_loss(logits, *of_rows, d_logits, kernel)
        losses.append(rows.loss.sum())
        chunk.put_rows(stats, rows[1:])

    gradients = sweep_chunks(chunked, chunked.groups(target), work, wanted)
    loss = torch.stack(losses).sum() if losses else stats.logp.new_zeros(())
    return FusedHead(loss, stats, gradients)


@_implements(linear.linear_shard_moments)
def _shard_moments(head: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, sweep: SweepArgs) -> RowMoments:
    return moments_in_chunks(Head.of(head, sweep), target, readout, tiles)


@_implements(linear.linear_shard_observations)
def _shard_observations(
    head: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, sweep: SweepArgs
) -> Observed:
    if not head.weight.shape[0]:
        return no_columns(target, sweep.dtype)
    return observed_in_chunks(Head.of(head, sweep), target, readout)


_implements(linear.linear_shard_stats_backward)(_stats_backward)
