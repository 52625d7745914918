"""Completions and their prompts, as input of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

import unirl_kernels as uk


@dataclass(frozen=True, eq=False)
class Prompts:
    """Q prompts, padded on the left so that they end together.

    Args:
        ids: [Q, P] int64.
        mask: [Q, P] bool, False at padding.
    """

    ids: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """[Q, P] int64: the place of each token in its prompt."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Sequences:
    """S completions of prompts that they share.

    Args:
        prompts: the prompts.
        prompt_of: [S] int64, the prompt of each completion.
        ids: [S, C] int64, the completions, padded on the right.
        mask: [S, C] bool, False at padding.
    """

    prompts: Prompts
    prompt_of: Tensor
    ids: Tensor
    mask: Tensor

    @property
    def inputs(self) -> Tensor:
        """[S, C + 1] int64: the prompt's last token, which is to predict the completion's first, and the completion."""
        return torch.cat([self.prompts.ids[self.prompt_of, -1:], self.ids], 1)

    @property
    def target(self) -> Tensor:
        """[S, C + 1] int64: the target of each position of ``inputs``, or ``IGNORE``."""
        return uk.shift_targets(self.inputs, pad(self.mask, (1, 0)))

    def select(self, rows: Tensor) -> Sequences:
        """The sequences of the given rows, with the prompts that they have."""
        used, prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        prompts = Prompts(self.prompts.ids[used], self.prompts.mask[used])
        return Sequences(prompts, prompt_of, self.ids[rows], self.mask[rows])


def lay_out_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> Prompts:
    """Arrange Q prompts, lists of token ids, in a batch on ``device``."""
    return Prompts(*_padded(prompts, "left", device))


def lay_out(prompts: Prompts, completions: Sequence[Sequence[int]], prompt_of: Sequence[int]) -> Sequences:
    """Arrange S completions, lists of token ids, in a batch with the prompts that they continue."""
    device = prompts.ids.device
    return Sequences(prompts, torch.tensor(prompt_of, device=device), *_padded(completions, "right", device))


def _padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """[n, longest] ids, 0 at padding (any token would do, nobody attends to it), and where they are not padding."""
    ids = [torch.tensor(row, dtype=torch.int64, device=device) for row in rows]
    masks = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_side=side),
        pad_sequence(masks, batch_first=True, padding_side=side),
    )
