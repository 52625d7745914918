"""Ranks in one process: collectives and merging on the values of four ranks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels.backends.groups import ReadoutArgs, RowMoments
from unirl_kernels.operators import shards
from unirl_kernels.operators.shards import ShardArgs, Tiles
from unirl_kernels.ranks.collectives import Gathered, Group, SumGradient, SumOverGroup, group_of

local = pytest.importorskip("torch.distributed._local_tensor")

WORLD, VOCAB = 4, 101
WIDTHS = [(26, 25, 25, 25), (50, 0, 51, 0), (0, 1, 99, 1)]
READOUT = ReadoutArgs(1.0, None, 0.7, None)


@pytest.fixture
def group() -> Iterator[Group]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    assert dist.group.WORLD is not None
    try:
        with local.LocalTensorMode(WORLD):
            yield group_of("group", dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def on_ranks(make: Callable[[int], Tensor]) -> Tensor:
    return local.LocalTensor({rank: make(rank) for rank in range(WORLD)})  # type: ignore[no-any-return]


def of_rank(x: Tensor, rank: int) -> Tensor:
    return x._local_tensors[rank]  # type: ignore[attr-defined,no-any-return]


def each(x: Tensor) -> list[Tensor]:
    return [of_rank(x, rank) for rank in range(WORLD)]


@pytest.mark.parametrize("same_targets", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
def test_merged_moments(group: Group, widths: tuple[int, ...], same_targets: bool) -> None:
    """The statistics of whole rows, with the same bits on all ranks."""
    with local.maybe_disable_local_tensor_mode():
        logits, target = torch.randn(2, 7, VOCAB), torch.randint(0, VOCAB, (2, 7))
        target[0, 3] = uk.IGNORE
        expected = uk.token_stats(logits, target, readout=uk.Readout(temperature=0.7))
        args = [
            ShardArgs(sum(widths[:rank]), widths[rank], VOCAB, group, same_targets, Tiles(VOCAB, 1))
            for rank in range(WORLD)
        ]
        parts = [
            shards.shard_moments(x, own.target(target), READOUT, own.tiles, "eager")
            for own, x in zip(args, logits.split(widths, -1), strict=True)
        ]
    moments = RowMoments(*(on_ranks(lambda rank, f=field: getattr(parts[rank], f)) for field in RowMoments._fields))
    stats, _ = shards.merged(moments, on_ranks(lambda rank: target), READOUT, args[0])
    for found, truth in zip(stats, expected, strict=True):
        assert all(torch.equal(x, of_rank(found, 0)) for x in each(found))
        torch.testing.assert_close(of_rank(found, 0), truth)


def test_other_targets_give_nan(group: Group) -> None:
    values = [on_ranks(lambda rank: torch.ones(1, 1, 3))] * 4
    target = on_ranks(lambda rank: torch.tensor([[rank == 2, 0, 0]]).long())
    found = shards.exchanged(values, target, ShardArgs(0, 1, VOCAB, group, False, Tiles(VOCAB, 1)))
    assert all(bool(x.isnan().all()) for value in found for x in each(value))


def test_gradients_of_collectives(group: Group) -> None:
    """Each rank weights what it received differently. The loss is the sum of the ranks' losses."""
    with local.maybe_disable_local_tensor_mode():
        values = torch.randn(WORLD, 3, 2, dtype=torch.float64)
        weights = torch.randn(WORLD, WORLD * 3, 2, dtype=torch.float64)
    for factor in (1, WORLD):
        x = on_ranks(lambda rank: values[rank].clone()).requires_grad_()
        found = Gathered.apply(x, group, torch.float64, factor)
        assert all(torch.equal(y, values.flatten(0, 1)) for y in each(found.detach()))
        (found * on_ranks(lambda rank: weights[rank])).sum().backward()
        assert x.grad is not None
        for rank, d in enumerate(each(x.grad)):
            torch.testing.assert_close(d, factor * weights.sum(0)[3 * rank : 3 * rank + 3])
    own = weights[:, :3]
    for total in (SumOverGroup, SumGradient):
        x = on_ranks(lambda rank: values[rank].clone()).requires_grad_()
        found = total.apply(x, group) if total is SumOverGroup else total.apply(x, group, torch.float64)
        (found * on_ranks(lambda rank: own[rank])).sum().backward()
        assert x.grad is not None
        for rank, (y, d) in enumerate(zip(each(found.detach()), each(x.grad), strict=True)):
            torch.testing.assert_close(y, values.sum(0) if total is SumOverGroup else values[rank])
            torch.testing.assert_close(d, own.sum(0))
