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
from unirl_kernels.head.sweep import Head, sweep
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
def _token_stats(args: HeadArgs, target: Tensor, readout: ReadoutArgs, how: SweepArgs) -> Measured:
    return measured_in_tiles(_checked(args, target, how), target, readout)


@_implements(linear.linear_token_observations)
def _token_observations(args: HeadArgs, target: Tensor, readout: ReadoutArgs, how: SweepArgs) -> Observed:
    return observed_in_tiles(_checked(args, target, how), target, readout)


def _checked(args: HeadArgs, target: Tensor, how: SweepArgs) -> Head:
    check_targets(target, args.weight.shape[0])
    head = Head.of(args, how)
    if how.max_chunk_bytes is not None:
        head.rows_per_chunk()  # raise here, not in the backward, if the memory is too small
    return head


@_implements(linear.linear_token_stats_backward)
def _token_stats_backward(
    args: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    how: SweepArgs,
    wanted: Wanted,
) -> HeadGradients:
    # If the bits of the logits differ, these moments give probabilities that do not add up to 1: at a low temperature
    # the error is some percent. So without repeatable matmuls each chunk is measured again.
    known = moments if Head.of(args, how).matmuls.repeatable else None
    return _stats_backward(args, target, readout, known, gradients, how, wanted)


def _stats_backward(
    args: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments | None,
    gradients: RowGradients,
    how: SweepArgs,
    wanted: Wanted,
) -> HeadGradients:
    """The gradients of a head from those of the statistics. Without moments, each chunk computes them again."""
    head = _swept(args, target, how)

    def work(logits: Tensor, d_logits: Tensor, chunk: Chunk) -> None:
        of_rows = chunk.row(target), chunk.rows(readout)
        known = head.kernels.token_stats(logits, *of_rows).moments if moments is None else chunk.rows(moments)
        head.kernels.token_stats_backward(logits, *of_rows, known, chunk.rows(gradients), d_logits)

    return sweep(head, head.groups(target), work, wanted)


def _swept(args: HeadArgs, target: Tensor, how: SweepArgs) -> Head:
    """A head whose gradients are computed."""
    return Head.of(args._replace(hidden=without_ignored(args.hidden, target.reshape(-1))), how)


@_implements(linear.fused_linear_loss)
def _fused_loss(
    args: HeadArgs,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    kernel: str,
    how: SweepArgs,
    wanted: Wanted,
) -> FusedHead:
    check_targets(target, args.weight.shape[0])
    head = _swept(args, target, how)
    losses: list[Tensor] = []
    (stats,) = no_rows(target, head, RowStats)

    def work(logits: Tensor, d_logits: Tensor, chunk: Chunk) -> None:
        of_rows = chunk.row(target), chunk.rows(readout), chunk.program(program)
        rows = head.kernels.fused_loss(logits, *of_rows, d_logits, kernel)
        losses.append(rows.loss.sum())
        chunk.put_rows(stats, rows[1:])

    gradients = sweep(head, head.groups(target), work, wanted)
    loss = torch.stack(losses).sum() if losses else stats.logp.new_zeros(())
    return FusedHead(loss, stats, gradients)


@_implements(linear.linear_shard_moments)
def _shard_moments(args: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, how: SweepArgs) -> RowMoments:
    return moments_in_chunks(Head.of(args, how), target, readout, tiles)


@_implements(linear.linear_shard_observations)
def _shard_observations(args: HeadArgs, target: Tensor, readout: ReadoutArgs, tiles: Tiles, how: SweepArgs) -> Observed:
    if not args.weight.shape[0]:
        return no_columns(target, how.dtype)
    return observed_in_chunks(Head.of(args, how), target, readout)


_implements(linear.linear_shard_stats_backward)(_stats_backward)
