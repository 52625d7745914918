"""Optimisation steps on the fused loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import unirl_kernels as uk
from examples.demo.model import LanguageModel
from examples.demo.sequences import Sequences

MAX_GRAD_NORM = 1.0
SEQUENCES_PER_PASS = 32


@dataclass(frozen=True)
class Step:
    """Values of one optimisation step.

    Args:
        loss: of the whole batch, before the step.
        metrics: ``LossOutput.metrics``, means over the batch's tokens.
        grad_norm: L2 norm of the parameters' gradient, before clipping.
    """

    loss: float
    metrics: dict[str, float]
    grad_norm: float


def passes(batch: uk.Batch) -> int:
    """How many passes a step on this batch takes."""
    return -(-batch.n_sequences // SEQUENCES_PER_PASS)


def optimise(
    policy: LanguageModel,
    optimizer: torch.optim.Optimizer,
    sequences: Sequences,
    batch: uk.Batch,
    loss: uk.Loss,
    *,
    plan: uk.Plan,
    after_pass: Callable[[], object] = lambda: None,
) -> Step:
    """One step of the optimizer on a loss that averages over sequences.

    The batch is processed in parts, to bound the memory for activations. Each part is weighted by its share of the
    sequences. Logits exist for a chunk of tokens at a time.

    Args:
        policy: the model to train.
        optimizer: of its parameters.
        sequences, batch: what to learn from.
        loss: a recipe with ``SequenceMean``.
        plan: how the loss is computed.
        after_pass: called after every pass; to show progress.
    """
    rows = torch.arange(batch.n_sequences, device=policy.device)
    total, n_tokens = 0.0, int(batch.valid.sum())
    metrics: dict[str, float] = {}
    for part in rows.split(SEQUENCES_PER_PASS):
        mine = _select(batch, part)
        out = policy.loss(sequences.select(part), mine, loss, plan)
        share = len(part) / len(rows)
        (share * out.loss).backward()
        total += share * out.loss.item()
        for name, value in out.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.item() * int(mine.valid.sum()) / n_tokens
        after_pass()
    norm = torch.nn.utils.clip_grad_norm_(policy.network.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(total, metrics, float(norm))


def _select(batch: uk.Batch, rows: Tensor) -> uk.Batch:
    fields = {name: getattr(batch, name) for name in ("target", "advantage", "old_logp", "ref_logp")}
    return replace(batch, **{name: x[rows] for name, x in fields.items() if x is not None})
