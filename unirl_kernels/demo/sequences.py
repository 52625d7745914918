"""Prompts and completions as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

import unirl_kernels as uk


@dataclass(frozen=True, eq=False)
class Sequences:
    """S prompts, padded on the left so that they end together, each followed by its completion, padded on the right.

    Args:
        input_ids: [S, N] int64.
        attention: [S, N] bool, False at padding.
        start: the column where the completions start.
    """

    input_ids: Tensor
    attention: Tensor
    start: int

    @property
    def positions(self) -> Tensor:
        """[S, N] int64: the place of each token in its own sequence."""
        return (self.attention.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def target(self) -> Tensor:
        """[S, L] int64, L = N - start + 1: what the last L places are to predict, from the prompt's last token on."""
        completion = self.attention.clone()
        completion[:, : self.start] = False
        return uk.shift_targets(self.input_ids, completion)[:, self.start - 1 :].contiguous()

    def select(self, rows: Tensor) -> Sequences:
        return Sequences(self.input_ids[rows], self.attention[rows], self.start)


def lay_out(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> Sequences:
    """Arrange tokenised prompts and their completions in a batch.

    Args:
        prompts, completions: S lists of token ids each, a completion with its end-of-text token; no prompt empty.
        device: where the tensors are to be.
    """
    start = max(map(len, prompts))
    rows, masks = [], []
    longest = max(map(len, completions))
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([*prompt, *completion])
        gaps = (start - len(prompt), longest - len(completion))
        rows.append(pad(tokens, gaps))  # any token would do at padding: nobody attends to it
        masks.append(pad(torch.ones_like(tokens, dtype=torch.bool), gaps, value=False))
    return Sequences(torch.stack(rows).to(device), torch.stack(masks).to(device), start)
