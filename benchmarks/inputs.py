"""The tensors of a piece of work, at any level, and what a provider makes of them."""

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
"""A target's logit is raised by up to this: probabilities from chance to nearly 1."""


class Values(NamedTuple):
    """What a provider computes of the operands, differentiable in them. None: it does not say."""

    loss: Tensor | None = None  # 0-dim
    logp: Tensor | None = None  # [B, L]
    entropy: Tensor | None = None  # [B, L]


@dataclass(frozen=True)
class Inputs:
    """What a piece of work is done on.

    Args:
        work: what it was made for.
        operands: what is differentiated: logits, or hidden states and the head's weight; not to be written.
        batch: targets, advantages of both signs, old and reference policies a realistic distance away.
        d_logp, d_entropy: [B, L] float32, upstream gradients for statistics; 0 at ignored positions.
    """

    work: Work
    operands: tuple[Tensor, ...]
    batch: uk.Batch
    d_logp: Tensor
    d_entropy: Tensor

    @staticmethod
    def around(work: Work, operands: tuple[Tensor, ...], target: Tensor, logp: Tensor, draw: dict[str, Any]) -> Inputs:
        """The rest of the inputs, around what the operands say.

        Args:
            work: the work.
            operands: of its level.
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
        """[B, L]: targets for those who cannot take ``IGNORE``; any target stands at ignored positions."""
        return self.batch.target.clamp(min=0)

    @cached_property
    def used(self) -> Tensor:
        """[B, L] bool: the tokens that count."""
        return self.batch.valid

    def composed(self, logp: Tensor) -> Values:
        """The loss as plain PyTorch on log-probabilities, [B, L], as trainers compute it."""
        return Values(self.loss(logp), logp)

    def loss(self, logp: Tensor) -> Tensor:
        """The loss alone, 0-dim."""
        loss, nothing = self.work.recipe, torch.zeros_like(logp)
        return loss.composed(Tokens(self.batch, logp, nothing, nothing), loss.weights(self.batch))


def random_numbers(work: Work) -> dict[str, Any]:
    """Where the work's random numbers come from: the generator and device that torch's functions take."""
    device = torch.device(work.device)
    return {"generator": torch.Generator(device).manual_seed(work.seed), "device": device}


def ignore_last(work: Work, target: Tensor) -> None:
    """Mark the last position of each sequence, as ``shift_targets`` does; one of a single position keeps it."""
    if work.length > 1:
        target[:, -1] = uk.IGNORE
