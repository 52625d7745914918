"""The tensors of a piece of work, at any level, and the results of a provider."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.work import Work
from unirl_kernels.objectives import Tokens

SUREST = 20
"""A target's logit is increased by up to this, so that probabilities range from chance to nearly 1."""


class Values(NamedTuple):
    """Results of a provider, differentiable in the operands. None: not returned."""

    loss: Tensor | None = None  # 0-dim
    logp: Tensor | None = None  # [B, L]
    entropy: Tensor | None = None  # [B, L]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a piece of work.

    Args:
        work: the piece of work.
        operands: logits, or hidden states and the head's weight; differentiable, not to be written.
        batch: targets, advantages of both signs, old and reference policies at a realistic distance.
        d_logp, d_entropy: [B, L] float32, upstream gradients for statistics; 0 at ignored positions.
    """

    work: Work
    operands: tuple[Tensor, ...]
    batch: uk.Batch
    d_logp: Tensor
    d_entropy: Tensor

    @staticmethod
    def around(work: Work, operands: tuple[Tensor, ...], target: Tensor, logp: Tensor, draw: dict[str, Any]) -> Inputs:
        """Make the other inputs for given operands.

        Args:
            work: the work.
            operands: the operands of its level.
            target: [B, L], the last position of each sequence ignored.
            logp: [B, L] float32, log-probabilities of the targets.
            draw: generator and device of random numbers.
        """
        shape = target.shape
        old_logp, ref_logp = ((logp + d * torch.randn(shape, **draw)).clamp(max=0) for d in (0.3, 0.2))
        advantage = torch.randn(work.sequences, **draw)
        if work.loss in ("rft", "online_rft"):
            advantage = (advantage > 0).float()
        batch = uk.Batch(target, advantage, None if work.on_policy else old_logp, ref_logp)
        d_logp, d_entropy = (torch.where(batch.valid, torch.randn(shape, **draw), 0) for _ in range(2))
        return Inputs(work, operands, batch, d_logp, d_entropy)

    @cached_property
    def index(self) -> Tensor:
        """[B, L]: targets for providers that do not support ``IGNORE``; ignored positions have any valid target."""
        return self.batch.target.clamp(min=0)

    @cached_property
    def used(self) -> Tensor:
        """[B, L] bool: tokens that are not ignored."""
        return self.batch.valid

    def composed(self, logp: Tensor) -> Values:
        """The loss as plain PyTorch on log-probabilities, [B, L], as trainers compute it."""
        return Values(self.loss(logp), logp)

    def loss(self, logp: Tensor) -> Tensor:
        """The loss alone, 0-dim."""
        loss, nothing = self.work.recipe, torch.zeros_like(logp)
        return loss.composed(Tokens(self.batch, logp, nothing, nothing), loss.weights(self.batch))


def random_numbers(work: Work) -> dict[str, Any]:
    """The work's random numbers: generator and device, as keyword arguments of torch's functions."""
    device = torch.device(work.device)
    return {"generator": torch.Generator(device).manual_seed(work.seed), "device": device}


def ignore_last(work: Work, target: Tensor) -> None:
    """Mark the last position of each sequence, as ``shift_targets`` does; one of a single position keeps it."""
    if work.length > 1:
        target[:, -1] = uk.IGNORE
