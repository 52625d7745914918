"""verl's functions of logits whose vocabulary is split over Megatron's tensor-parallel group.

Results are float32 also for 16-bit logits. Megatron pads the vocabulary, and verl counts the padding as columns: so do
these, as they cannot know how much it is.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from unirl_kernels.api import token_stats
from unirl_kernels.integrations.rows import entropy, whole_rows
from unirl_kernels.ranks.shard import VocabShard


def even_shard(group: torch.distributed.ProcessGroup, columns: int, **how: str) -> VocabShard:
    """The shard of a rank where all ranks have the same number of columns.

    Args:
        group: over which the vocabulary is split.
        columns: of each rank.
        how: further arguments of ``VocabShard``.
    """
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    return VocabShard(group, rank * columns, size * columns, **how)  # type: ignore[arg-type]


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """log pi of each label.

    Args:
        logits: [..., V / n], the columns of this rank.
        labels: [...] int64, in [0, V).

    Returns:
        [...] float32, the same on all ranks of the group.
    """
    rows = whole_rows(logits)
    target = labels.reshape(rows.shape[:-1])
    return token_stats(rows, target, shard=_shard(logits)).logp.view(labels.shape)


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V / n], the columns of this rank."""
    return entropy(vocab_parallel_logits, _shard(vocab_parallel_logits))


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V / n].

    Args:
        vocab_parallel_logits: the columns of this rank.
        chunk_size: of verl's chunks, which keep its copies of the logits small; here there are none.
    """
    return vocab_parallel_entropy(vocab_parallel_logits)


def _shard(logits: Tensor) -> VocabShard:
    state = importlib.import_module("megatron.core.parallel_state")
    return even_shard(state.get_tensor_model_parallel_group(), logits.shape[-1])
