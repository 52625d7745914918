"""Bits that do not depend on the number of ranks; run by ``tests/distributed/shards.py``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.distributed.split import CASES, VOCAB, columns_of, make
from tests.distributed.split_heads import SHAPE
from tests.linear import make_head

TILES = 8
WIDTHS = {1: (VOCAB,), 2: (52, 49), 4: (26, 26, 26, 23)}
"""Whole tiles of 13 columns."""


def shard_of(ranks: int, tiles: int | None) -> tuple[uk.VocabShard, tuple[int, ...], int]:
    """This rank's shard if the vocabulary is split over n ranks, the widths of all shards, and its index."""
    first = dist.get_rank() // ranks * ranks
    groups = [dist.new_group(list(range(k, k + ranks))) for k in range(0, dist.get_world_size(), ranks)]
    rank, widths = dist.get_rank() - first, WIDTHS[ranks]
    return uk.VocabShard(groups[first // ranks], sum(widths[:rank]), VOCAB, tiles=tiles), widths, rank


def found(ranks: int, tiles: int | None) -> list[torch.Tensor]:
    """Statistics of logits and heads, and the losses of heads in one chunk and in two passes."""
    shard, widths, rank = shard_of(ranks, tiles)
    values: list[torch.Tensor] = []
    for case in CASES:
        logits, batch = make(case, BY_NAME["grpo"])
        x = columns_of(logits, widths, rank)
        values += uk.token_stats(x, batch.target, readout=case.readout, shard=shard)
        values.append(uk.fused_loss(x, batch, uk.dpo(), readout=case.readout, shard=shard).loss)
    head = make_head(SHAPE, BY_NAME["grpo"])
    operands = (head.hidden.requires_grad_(), columns_of(head.weight, widths, rank, dim=0))
    values += uk.linear_token_stats(*operands, head.batch.target, shard=shard)
    values.append(uk.fused_linear_loss(*operands, head.batch, uk.dpo(), shard=shard).loss)
    return [x.detach() for x in values]


def check_all() -> None:
    world = dist.get_world_size()
    counts = [n for n in (1, 2, 4) if n <= world]
    alone, *others = (found(n, TILES) for n in counts)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(alone, other, strict=True))
    for a, b in zip(alone, found(world, None), strict=True):
        torch.testing.assert_close(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(found(1, None), found(world, None), strict=True)), "needs no tiles"
    check_bad_input()


def check_bad_input() -> None:
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()

    def refuses(kind: Any, text: str, call: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=re.escape(text)):
            call()

    refuses(
        ValueError,
        "start must be a multiple of the 13 columns of a tile, got 14",
        lambda: uk.VocabShard(group, 14, VOCAB, tiles=TILES),
    )
    shard = uk.VocabShard(group, 0 if rank == 0 else 78, VOCAB, tiles=TILES)
    logits = torch.zeros(1, 2, 78 if rank == 0 else 23 if rank == 1 else 0)
    target = torch.zeros(1, 2, dtype=torch.int64)
    own = f"each of {world} ranks must have at most {TILES // world} of {TILES} tiles"
    kind, text = (ValueError, own) if rank == 0 else (RuntimeError, "rank 0 of its group refuses its arguments")
    refuses(kind, text, lambda: uk.token_stats(logits, target, shard=shard))
    shard, widths, place = shard_of(world, TILES)
    whole = torch.zeros(1, 2, widths[place])
    text = f"shard.tiles must be None for observations, got {TILES}"
    refuses(ValueError, text, lambda: uk.token_observations(whole, target, shard=shard))
