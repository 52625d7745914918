"""An objective as plain PyTorch on the statistics of whole sequences or pairs, a chunk of them at a time.

Its gradient is formed from the logits that gave the statistics: three products, where statistics first and logits once
more in the backward take four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unirl_kernels import ops
from unirl_kernels.backends import ReadoutArgs, RowGradients, RowStats
from unirl_kernels.batch import Batch
from unirl_kernels.head.chunks import Group
from unirl_kernels.head.sweep import Gradients, Head, Wanted, sweep
from unirl_kernels.objectives import Loss, Tokens


@dataclass(frozen=True, eq=False)
class Composition:
    """What is computed of a head's logits.

    Args:
        batch, loss: of the whole.
        groups: what is worked on together; no unit of the loss's scope reaches across two.
        readout: how logits become log-probabilities.
        dtype: of the products' operands.
        backend: name of the one that computes.
    """

    batch: Batch
    loss: Loss
    groups: Sequence[Group]
    readout: ReadoutArgs
    dtype: torch.dtype
    backend: str


def composed(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, composition: Composition, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Loss, logp [T], entropy [T] and ``Gradients`` of a composition.

    Args:
        hidden: [T, D].
        weight: [V, D].
        bias: [V] or None.
        composition: what is computed.
        wanted: which gradients.
    """
    ops.check_targets(composition.batch.target, weight.shape[0])
    head = Head(hidden, weight, bias, composition.dtype, composition.backend)
    loss, groups = composition.loss, composition.groups
    target = composition.batch.target.reshape(-1)
    weights = loss.aggregation.weights(composition.batch).reshape(-1)
    logp, entropy = (hidden.new_zeros(target.shape, dtype=head.row_dtype) for _ in range(2))
    values = []

    def work(logits: Tensor, d_logits: Tensor, k: int) -> None:
        group, chunk = groups[k], groups[k].chunk
        at, readout = chunk.row(target), chunk.rows(composition.readout)
        stats = head.kernels.token_stats(logits, at, readout)
        of_units = weights[slice(*group.units)] if loss.scope == "pair" else chunk.take(weights)
        value, d_stats = _differentiated(loss, _part(composition.batch, group), stats, of_units)
        head.kernels.token_stats_backward(logits, at, stats, d_stats, readout, d_logits)
        values.append(value)
        for whole, part in zip((logp, entropy), stats, strict=False):
            chunk.put(whole, part.squeeze(0))

    with torch.autocast(hidden.device.type, enabled=False):
        gradients = sweep(head, [group.chunk for group in groups], work, Wanted(*wanted))
    total = torch.stack(values).sum() if values else logp.new_zeros(())
    return total.to(head.row_dtype), logp, entropy, gradients


def _differentiated(loss: Loss, batch: Batch, stats: RowStats, weights: Tensor) -> tuple[Tensor, RowGradients]:
    """The loss of a part, and its gradient with respect to the statistics, [1, n] each."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in stats]
        value = loss.composed(Tokens(batch, *leaves), weights)
        if not value.requires_grad:
            return value, RowGradients(None, None, None)
        _check_no_others(value, leaves)
        return value.detach(), RowGradients(*torch.autograd.grad(value, leaves, allow_unused=True))


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
                f"them, got one of shape {tuple(variable.shape)}: form the loss from linear_token_stats"
            )
        left += [following for following, _ in node.next_functions]


def _part(batch: Batch, group: Group) -> Batch:
    """The group's sequences as a packed batch of the tokens that count."""
    device = batch.target.device
    cu_seqlens = torch.tensor([0, *group.lengths]).cumsum(0).to(device, torch.int32)
    advantage = batch.advantage
    if advantage is not None and advantage.shape != batch.target.shape:
        advantage = batch.per_token(advantage)
    optional = (advantage, batch.old_logp, batch.ref_logp)
    advantage, old_logp, ref_logp = (None if x is None else group.chunk.take(x.reshape(-1)) for x in optional)
    return Batch(group.chunk.take(batch.target.reshape(-1)), advantage, old_logp, ref_logp, cu_seqlens)
