"""Losses of any scope on a linear head, in chunks: statistics, the objectives as plain PyTorch, the gradient.

The gradient is computed from the same logits as the statistics: three matmuls. Computing all statistics first, and the
logits again in the backward, would take four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends.groups import ReadoutArgs, RowGradients, RowObservations, RowStats
from unirl_kernels.batch import Batch
from unirl_kernels.head.chunks import Chunk, Part
from unirl_kernels.head.statistics import no_rows
from unirl_kernels.head.sweep import AtOnce, Head, Summed, sweep_chunks
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators.declare import flat
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted
from unirl_kernels.operators.linear_autograd import keep, scaled_gradients
from unirl_kernels.operators.rows import check_targets
from unirl_kernels.operators.shards import ShardArgs, measured_chunk


class Composition(NamedTuple):
    """A loss of a batch, to be computed from a head's logits in independent parts."""

    batch: Batch
    loss: Loss
    parts: Sequence[Part]
    readout: ReadoutArgs
    observes: bool = False  # whether observations are computed too
    shard: ShardArgs | None = None
    sums: bool = False  # whether the gradient of hidden is summed over the ranks


class ComposedLinear(torch.autograd.Function):
    """Loss, statistics and observations of a ``Composition``, [T] each. The forward computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, composition: Composition, sweep: SweepArgs
    ) -> tuple[Tensor, ...]:
        # Operators resolve the bit of torch._neg_view, but here kernels are called without them.
        head = HeadArgs(hidden.resolve_neg(), weight.resolve_neg(), None if bias is None else bias.resolve_neg())
        with torch.autocast(hidden.device.type, enabled=False):
            loss, found, gradients = _composed(head, composition, sweep, Wanted(*ctx.needs_input_grad[:3]))
        keep(ctx, head, gradients, sweep.backend)
        ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, d_loss), None, None


def _composed(
    head: HeadArgs, composition: Composition, sweep: SweepArgs, wanted: Wanted
) -> tuple[Tensor, list[Tensor], HeadGradients]:
    batch, loss, parts, readout, observes, shard, sums = composition
    check_targets(batch.target, head.weight.shape[0] if shard is None else shard.vocab)
    chunked = Head.of(head, sweep)
    target = batch.target.reshape(-1)
    weights = loss.weights(batch)
    whole = flat(no_rows(target, chunked, *([RowStats, RowObservations] if observes else [RowStats])))
    losses: list[Tensor] = []
    part_of = {part.chunk: part for part in parts}

    def work(logits: Tensor, d_logits: Tensor, chunk: Chunk) -> None:
        part = part_of[chunk]
        at, of_readout = chunk.row(target), chunk.rows(readout)
        function = chunked.kernels.token_observations if observes else chunked.kernels.token_stats
        stats, moments, *observed = measured_chunk(function, logits, at, of_readout, shard)
        of_part = [part.weights(w, term.scope) for w, term in zip(weights, loss.terms, strict=True)]
        value, d_stats = _differentiated(loss, part.batch, stats, of_part)
        if logits.shape[-1]:
            own = at if shard is None else shard.target(at)
            chunked.kernels.token_stats_backward(logits, own, of_readout, moments, d_stats, d_logits)
        losses.append(value)
        chunk.put_rows(whole, (*stats, *flat(observed)))

    of_hidden = Summed(shard.ranks) if shard is not None and sums else AtOnce()
    gradients = sweep_chunks(chunked, [[part.chunk] for part in parts], work, wanted, of_hidden)
    total = torch.stack(losses).sum() if losses else whole[0].new_zeros(())
    return total.to(chunked.row_dtype), whole, gradients


def _differentiated(
    loss: Loss, batch: Batch, stats: RowStats, weights: Sequence[Tensor]
) -> tuple[Tensor, RowGradients]:
    """The loss of a part, and its gradients with respect to the statistics of its valid tokens, [1, n] each."""
    counted = batch.valid.reshape(-1)
    with torch.enable_grad():
        leaves = [x.detach().squeeze(0).requires_grad_() for x in stats]
        at_positions = (x.new_zeros(counted.shape).masked_scatter(counted, x) for x in leaves)
        value = loss.composed(Tokens(batch, *at_positions), weights)
        if not value.requires_grad:
            return value, RowGradients(None, None, None)
        _check_no_others(value, leaves)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), RowGradients(*(None if x is None else x.unsqueeze(0).contiguous() for x in gradients))


def _check_no_others(value: Tensor, leaves: Sequence[Tensor]) -> None:
    """Raise a ``ValueError`` if the objective depends on another tensor whose gradient would be lost."""
    seen, left = set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and all(variable is not leaf for leaf in leaves):
            raise ValueError(
                "the objective must not depend on tensors that require a gradient, whose gradient a linear head "
                f"does not compute, got one of shape {tuple(variable.shape)}: pass it in Batch(fields=...), or compute "
                "the loss from linear_token_stats"
            )
        left += [following for following, _ in node.next_functions]
