"""A loss that a configuration means against the trainer's own code on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels.testing.budgets import condition_of, violations

V = 11

Theirs = Callable[["Scored", dict[str, Any]], tuple[Tensor, Mapping[str, float]]]
"""The trainer's loss, 0-dim, and what it logged, from scored tokens and the fields."""


class Scored(NamedTuple):
    """What a trainer's head gives of each token; 0 where the target is ignored."""

    logp: Tensor
    entropy: Tensor
    mask: Tensor


def cast(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point tensors in another dtype."""
    floating = {name for name, x in fields.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x.to(dtype) if name in floating else x for name, x in fields.items()}


def scored(logits: Tensor, target: Tensor) -> Scored:
    logp = torch.log_softmax(logits, -1)
    mask = target != uk.IGNORE
    chosen = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return Scored(torch.where(mask, chosen, 0), torch.where(mask, -(logp.exp() * logp).sum(-1), 0), mask)


def check(
    loss: uk.Loss,
    theirs: Theirs,
    logits: Tensor,
    target: Tensor,
    given: Mapping[str, Any],
    batch_of: Callable[[dict[str, Any]], uk.Batch],
    same: Callable[[uk.LossOutput], Mapping[str, Tensor]],
    exact: torch.dtype = torch.float64,
) -> None:
    """Assert that loss, gradient and metrics are within the budget that the trainer's own float32 sets.

    Args:
        loss: what the configuration means.
        theirs: the trainer's.
        logits: [B, L, V] float64.
        target: [B, L].
        given: what both read, float64.
        batch_of: makes the batch of it.
        same: the metrics of an output that the trainer must have logged, by its names.
        exact: dtype of the trainer's reference.
    """

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor, Mapping[str, float]]:
        leaf = logits.to(dtype).requires_grad_()
        value, metrics = theirs(scored(leaf, target), cast(given, dtype))
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient, metrics

    leaf = logits.float().requires_grad_()
    out = uk.fused_loss(leaf, batch_of(cast(given, torch.float32)), loss)
    out.loss.backward()
    assert leaf.grad is not None
    value, gradient, logged = run(torch.float32)
    true_value, true_gradient, truth = run(exact)
    size = logits.abs().max().item()
    found = dict(same(out))
    assert found.keys() == logged.keys()
    compared = {"loss": (out.loss.detach(), value, true_value), "gradient": (leaf.grad, gradient, true_gradient)}
    for name, x in found.items():
        compared[name] = (x, *(torch.tensor(of[name], dtype=torch.float64) for of in (logged, truth)))
    for name, (ours, plain, exactly) in compared.items():
        condition = condition_of(exactly.double(), size)
        problems = violations(ours, plain.float(), exactly.double(), condition=condition)
        assert not problems, f"{name}: {problems}"


def check_layouts(loss: uk.Loss, batch: uk.Batch) -> None:
    """Assert that a loss is the same padded and packed, of logits and of a linear head, in one chunk and in several.

    Args:
        loss: the loss; one of token scope has to run in one pass.
        batch: padded, without IGNORE before the last token of a sequence.
    """
    loss.check_scopes()
    if loss.scope == "token":
        loss.traced()
    hidden, weight = torch.randn(*batch.target.shape, 8), torch.randn(V, 8)
    used = batch.target != uk.IGNORE

    def run(hidden: Tensor, batch: uk.Batch, plan: uk.Plan | None) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the rows that count; without a plan of logits."""
        leaf, head = hidden.clone().requires_grad_(), weight.to(hidden.dtype)
        if plan is None:
            out = uk.fused_loss(leaf @ head.T, batch, loss)
        else:
            out = uk.fused_linear_loss(leaf, head, batch, loss, plan=plan)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return out.loss.detach(), gradient if hidden.dim() == 2 else gradient[used]

    truth, plain = run(hidden.double(), exactly(batch), None), run(hidden, batch, None)
    size = (hidden @ weight.T).abs().max().item()
    for other, rows in ((batch, hidden), (packed(batch), hidden[used])):
        for plan in (None, uk.Plan(), uk.Plan(max_chunk_bytes=4 * V * 5)):
            for x, of_plain, exact in zip(run(rows, other, plan), plain, truth, strict=True):
                problems = violations(x, of_plain, exact, condition=condition_of(exact, size))
                assert not problems, f"{other.target.shape}, {plan}: {problems}"


def packed(batch: uk.Batch) -> uk.Batch:
    """A padded batch, packed."""
    valid = batch.valid

    def flat(x: Tensor | None) -> Tensor | None:
        return x[valid] if x is not None and x.shape == valid.shape else x

    ends = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)).int()
    given = [flat(x) for x in (batch.target, batch.advantage, batch.old_logp, batch.ref_logp)]
    return uk.Batch(*given, ends, {name: flat(x) for name, x in batch.fields.items()})  # type: ignore[arg-type, misc]


def exactly(batch: uk.Batch) -> uk.Batch:
    """A batch in float64."""
    fields = cast({name: getattr(batch, name) for name in ("advantage", "old_logp", "ref_logp")}, torch.float64)
    return uk.Batch(batch.target, **fields, fields=cast(batch.fields, torch.float64))
