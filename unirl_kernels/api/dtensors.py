"""The shards of DTensors."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from unirl_kernels.operators.linear import HeadArgs
from unirl_kernels.ranks.shard import VocabShard


def shard_of_logits(logits: Tensor, given: VocabShard | None) -> tuple[Tensor, VocabShard | None]:
    """Logits and shard of this rank: the given ones, or those of a DTensor that is split only along the vocabulary.

    A DTensor with another placement is returned unchanged; the checks refuse it.
    """
    if given is not None or type(logits).__name__ != "DTensor":
        return logits, given
    dimension = _split_dimension(logits, logits.dim() - 1)
    return (logits, None) if dimension is None else (_local(logits), _shard(logits, dimension, logits.shape[-1]))


def shard_of_head(head: HeadArgs, given: VocabShard | None) -> tuple[HeadArgs, VocabShard | None]:
    """Head and shard of this rank: the given ones, or those of a weight that is a DTensor split along the vocabulary,
    with hidden states that are replicated on the same mesh.

    An FSDP2 weight is split in the same way, but each rank has other tokens, in plain tensors. It is returned
    unchanged; the checks refuse it.
    """
    if given is not None or type(head.weight).__name__ != "DTensor":
        return head, given
    hidden, weight, bias = parts = cast(tuple[Any, Any, Any], head)
    if any(type(x).__name__ != "DTensor" or x.device_mesh != weight.device_mesh for x in parts if x is not None):
        return head, None
    dimension = _split_dimension(weight, 0)
    replicated = all(placement.is_replicate() for placement in hidden.placements)
    if dimension is None or not replicated or (bias is not None and _split_dimension(bias, 0) != dimension):
        return head, None
    own = HeadArgs(_local(hidden), _local(weight), None if bias is None else _local(bias))
    return own, _shard(weight, dimension, weight.shape[0])


def _split_dimension(x: Any, dim: int) -> int | None:
    """The mesh dimension along which x is split at ``dim``; None if x is also split otherwise."""
    split = [k for k, placement in enumerate(x.placements) if not placement.is_replicate()]
    return split[0] if len(split) == 1 and x.placements[split[0]].is_shard(dim) else None


def _local(x: Any) -> Tensor:
    return x.to_local()  # type: ignore[no-any-return]


def _shard(x: Any, dimension: int, vocab: int) -> VocabShard:
    ranks = x.device_mesh.size(dimension)
    start = -(-vocab // ranks) * x.device_mesh.get_local_rank(dimension)
    return VocabShard(x.device_mesh.get_group(dimension), min(start, vocab), vocab)
