"""Helpers for functions of logits in other libraries: any strides, and entropies without targets."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.api import token_stats
from unirl_kernels.ranks.shard import VocabShard


def whole_rows(logits: Tensor) -> Tensor:
    """[T, V] or [B, L, V] of [..., V], with contiguous rows for the kernels: other libraries accept any strides."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])


def entropy(logits: Tensor, shard: VocabShard | None = None) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V]; with a shard V is what this rank has."""
    rows = whole_rows(logits)
    target = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(rows, target, shard=shard).entropy.view(logits.shape[:-1])
