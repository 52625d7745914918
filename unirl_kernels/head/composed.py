"""Losses of any scope on a linear head, in chunks: statistics, the objectives as plain PyTorch, the gradient.

The gradient is formed from the logits that gave the statistics: three matmuls, where statistics first and logits once
more in the backward take four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import ReadoutArgs, RowGradients, RowObservations, RowStats
from unirl_kernels.batch import Batch
from unirl_kernels.head.chunks import Group
from unirl_kernels.head.rows import ObservedRows, Rows
from unirl_kernels.head.sweep import Head, sweep
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators.linear import HeadArgs, HeadGradients, SweepArgs, Wanted
from unirl_kernels.operators.linear_autograd import keep, scaled_gradients
from unirl_kernels.operators.rows import check_targets


class Composition(NamedTuple):
    """What is computed of a head's logits: a loss of a batch, in groups that do not depend on one another."""

    batch: Batch
    loss: Loss
    groups: Sequence[Group]
    readout: ReadoutArgs
    rows: Rows


class ComposedLinear(torch.autograd.Function):
    """Loss, logp, entropy, lse of a ``Composition``, [T] each, with its gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, composition: Composition, how: SweepArgs
    ) -> tuple[Tensor, ...]:
        head = HeadArgs(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            loss, stats, gradients = _composed(head, composition, how, Wanted(*ctx.needs_input_grad[:3]))
        keep(ctx, head, gradients, how.backend)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, d_loss), None, None


def observations(composition: Composition) -> RowObservations:
    """What ``ObservedRows`` observed of a composition that has run, [T] each; argmax -1 at ignored tokens, else 0."""
    assert isinstance(composition.rows, ObservedRows)
    target = composition.batch.target.reshape(-1)
    dtype = composition.rows.found[0].mean_logit.dtype if composition.rows.found else torch.float32
    a, b, c = (torch.zeros_like(target, dtype=dtype) for _ in range(3))
    whole = RowObservations(a, b, c, argmax=torch.full_like(target, -1))
    for group, found in zip(composition.groups, composition.rows.found, strict=True):
        for of_all, of_chunk in zip(whole, found, strict=True):
            group.chunk.put(of_all, of_chunk.squeeze(0))
    return whole


def _composed(
    args: HeadArgs, composition: Composition, how: SweepArgs, wanted: Wanted
) -> tuple[Tensor, RowStats, HeadGradients]:
    batch, loss, groups, readout, rows = composition
    check_targets(batch.target, rows.vocab(args.weight.shape[0]))
    head = Head.of(args, how)
    target = batch.target.reshape(-1)
    weights = loss.weights(batch)
    whole = RowStats(*(args.hidden.new_zeros(target.shape, dtype=head.row_dtype) for _ in RowStats._fields))
    losses: list[Tensor] = []

    def work(logits: Tensor, d_logits: Tensor, k: int) -> None:
        group, chunk = groups[k], groups[k].chunk
        at, of_readout = chunk.row(target), chunk.rows(readout)
        stats, moments = rows.measure(logits, at, of_readout)
        of_group = [group.weights(w, term.scope) for w, term in zip(weights, loss.terms, strict=True)]
        value, d_stats = _differentiated(loss, group.batch, stats, of_group)
        if logits.shape[-1]:
            head.kernels.token_stats_backward(logits, rows.target(at), of_readout, moments, d_stats, d_logits)
        losses.append(value)
        for of_all, of_chunk in zip(whole, stats, strict=True):
            chunk.put(of_all, of_chunk.squeeze(0))

    gradients = sweep(head, [group.chunk for group in groups], work, wanted, of_hidden=rows.of_hidden())
    total = torch.stack(losses).sum() if losses else whole.logp.new_zeros(())
    return total.to(head.row_dtype), whole, gradients


def _differentiated(
    loss: Loss, batch: Batch, stats: RowStats, weights: Sequence[Tensor]
) -> tuple[Tensor, RowGradients]:
    """The loss of a part, and its gradient with respect to the statistics of the tokens that count, [1, n] each."""
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
    """Raise a ``ValueError`` where the objective depends on a parameter of its own, whose gradient would be lost."""
    seen, left = set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and all(variable is not leaf for leaf in leaves):
            raise ValueError(
                "the objective must not depend on tensors that require a gradient, which a linear head does not give "
                f"them, got one of shape {tuple(variable.shape)}: pass it in Batch(fields=...), or form the loss from "
                "linear_token_stats"
            )
        left += [following for following, _ in node.next_functions]
