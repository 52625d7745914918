"""Sequences and batches that are split over processes; run by ``tests/distributed/shards.py``."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, Shape, make_case
from tests.distributed.split import changed
from tests.linear import SequenceRatio
from unirl_kernels.objectives import IPO, SFT, Scaled, Tokens, TopEntropy
from unirl_kernels.ranks.collectives import SumOverGroup

VOCAB = 31
SHAPES = [Shape("padded", "", (12, 5, 0, 7), VOCAB), Shape("packed", "", (12, 5, 0, 7), VOCAB, packed=True)]


class Early:
    """An objective that reads positions and lengths."""

    scope = "sequence"

    def __call__(self, t: Tokens) -> Tensor:
        return -t.logp * (2 * t.positions < t.to_tokens(t.lengths))


LOSSES = [
    uk.grpo(),
    uk.Loss(uk.grpo().objective, uk.TokenMean()),
    uk.Loss(uk.grpo().objective, uk.FixedLength(5, empty="skip")),
    uk.Loss(uk.grpo().objective, uk.Weighted(uk.GroupMean(), "trust")),
    uk.Loss(SequenceRatio()),
    uk.Loss(Early(), uk.TokenMean()),
    uk.dpo(),
    uk.dpo(0.5, length_normalized=True),
    uk.Loss(IPO(), uk.Weighted(uk.PairMean(), "trust")),
    uk.grpo() + 0.1 * uk.dpo() + 0.1 * uk.Loss(SequenceRatio()),
]


def whole(shape: Shape) -> tuple[Tensor, uk.Batch]:
    logits, batch = make_case(shape, BY_NAME["grpo"])
    fields = {"group": torch.tensor([0, 0, 1, 1]), "trust": torch.tensor([1.0, 0.5, 2.0, 0.25])}
    tensors = (batch.target, batch.advantage, batch.old_logp, batch.ref_logp, batch.cu_seqlens)
    return logits.double(), uk.Batch(*tensors, fields)


def positions_of(batch: uk.Batch, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Flat positions of this rank's part of every sequence, and its cumulative lengths."""
    offsets = batch.offsets.tolist()
    parts = [torch.arange(a, b) for a, b in itertools.pairwise(offsets)]
    own = [x.tensor_split(world)[rank] for x in parts]
    ends = torch.tensor([0, *[len(x) for x in own]]).cumsum(0)
    return torch.cat(own), ends


def part_of(batch: uk.Batch, at: Tensor, ends: Tensor) -> uk.Batch:
    fields = (None if x is None else x.reshape(-1)[at] for x in (batch.old_logp, batch.ref_logp))
    target = batch.target.reshape(-1)[at]
    if batch.cu_seqlens is not None:
        return uk.Batch(target, batch.advantage, *fields, ends, batch.fields, sequence_group=dist.group.WORLD)
    shape = (batch.n_sequences, -1)
    values = (target.view(shape), batch.advantage, *(x if x is None else x.view(shape) for x in fields))
    return uk.Batch(*values, None, batch.fields, sequence_group=dist.group.WORLD)


def allowed(logits: Tensor, batch: uk.Batch, loss: uk.Loss) -> float:
    """Twice what eager fp32 is away from fp64 on whole sequences, and 4 ulp, in the digits of fp64."""

    def found(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = logits.clone().to(dtype).requires_grad_()
        value = uk.fused_loss(x, batch, loss, plan=uk.Plan(backend="eager", kernel="composed")).loss
        value.backward()
        assert x.grad is not None
        return value.detach().double(), x.grad.double()

    (value, gradient), (expected, truth) = found(torch.float32), found(torch.float64)
    error = max(float((value / expected - 1).abs()), float((gradient - truth).abs().max() / truth.abs().max()))
    single, double = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    return 2 * error * double / single + 4 * double


def difference(logits: Tensor, batch: uk.Batch, loss: uk.Loss, head: bool) -> float:
    """Relative error of loss and gradient of the parts against those of whole sequences."""
    rank, world = dist.get_rank(), dist.get_world_size()
    at, ends = positions_of(batch, rank, world)
    x = logits.clone().requires_grad_()
    expected = uk.fused_loss(x, batch, loss).loss
    expected.backward()
    part = part_of(batch, at, ends)
    own = logits.reshape(-1, VOCAB)[at].view(*part.target.shape, VOCAB).clone().requires_grad_()
    if head:  # whose weight is the identity
        found = uk.fused_linear_loss(own, torch.eye(VOCAB, dtype=own.dtype), part, loss).loss
    else:
        found = uk.fused_loss(own, part, loss).loss
    found.backward()
    total = found.detach().clone()
    dist.all_reduce(total)
    assert x.grad is not None
    assert own.grad is not None
    truth = x.grad.reshape(-1, VOCAB)[at]
    gradient = (own.grad.reshape(-1, VOCAB) - truth).abs().max() / x.grad.abs().max()
    return max(float((total / expected.detach() - 1).abs()), float(gradient))


def check_sequences() -> None:
    """The sum of the ranks' losses is the loss of whole sequences, and so are the gradients."""
    for shape in SHAPES:
        logits, batch = whole(shape)
        for loss in LOSSES:
            most = allowed(logits, batch, loss)
            for head in (False, True):
                far = difference(logits, batch, loss, head)
                assert far <= most, f"{shape} {loss} {'head' if head else 'logits'}: {far} > {most}"


def check_fault_is_seen() -> None:
    """A planted fault: a sum over the group whose gradient is not summed."""
    logits, batch = whole(SHAPES[0])
    with changed(SumOverGroup, "backward", staticmethod(lambda ctx, d: (d, None))):
        for loss in (uk.Loss(SequenceRatio()), uk.dpo()):
            assert difference(logits, batch, loss, head=False) > allowed(logits, batch, loss)


def check_counts() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    _, batch = whole(SHAPES[0])
    part = part_of(batch, *positions_of(batch, rank, world))
    assert torch.equal(part.lengths, batch.lengths)
    group = dist.group.WORLD
    for of, n in (("tokens", int(batch.valid.sum())), ("sequences", 4), ("pairs", 2)):
        assert uk.global_count(part, group, of) == n
        assert uk.global_count(batch, group, of) == world * n
    bad: tuple[tuple[Any, type[Exception], str], ...] = (
        (uk.Batch(torch.zeros(3, 4, dtype=torch.int64)), ValueError, "an even number of sequences"),
        (None, TypeError, "batch must be a Batch, got NoneType"),
    )
    for given, kind, text in bad:
        if rank == world - 1:
            with pytest.raises(kind, match=text):
                uk.global_count(given, group, "pairs")
        else:
            assert uk.global_count(batch, group, "pairs").isnan()


INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)


def check_dtypes_of_a_global_batch() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.bool, *INTEGERS, torch.bfloat16, torch.float16, torch.float32, torch.float64):

        def of(rank: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.tensor([[rank, 1, 100], [0, rank, 3]]).to(dtype)

        batch = uk.Batch(torch.zeros(2, 3, dtype=torch.int64), fields={"x": of(rank), "y": of(rank)[:, 1]})
        everyone = uk.global_batch(batch, dist.group.WORLD)
        expected = torch.cat([of(k) for k in range(world)])
        assert torch.equal(everyone.fields["x"], expected)
        assert torch.equal(everyone.fields["y"], expected[:, 1])


def lone_part(per_token: bool, sure: bool, **named: Any) -> uk.Batch:
    """Two sequences; the last rank has two tokens, both of the second one, as all have unless one is sure."""
    rank, world = dist.get_rank(), dist.get_world_size()
    n = 3 if sure and rank < world - 1 else 2
    ends = torch.tensor([0, n - 2, n])
    advantage = torch.arange(n if per_token else 2) + 1.0
    fields = {"extra": advantage.double(), "step": torch.tensor(3)}
    values = (torch.zeros(n, dtype=torch.int64), advantage, torch.zeros(n), None, ends, fields)
    return uk.Batch(*values, sequence_group=dist.group.WORLD, **named)


def check_as_many_tokens_as_sequences() -> None:
    """The shapes on the other ranks decide whether a field has a value per token or per sequence."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for per_token in (False, True):
        batch = lone_part(per_token, sure=True)
        expected = [1.0, 2, 3][: 2 + (not last)] if per_token else [2.0, 2] if last else [1.0, 2, 2]
        for name in ("advantage", "extra"):
            assert batch.per_token_field(name).tolist() == expected
        assert batch.per_token_field("old_logp").tolist() == [0] * len(expected)
    text = "advantage is ambiguous: on all ranks of sequence_group target has as many tokens as sequences, some of them"
    with pytest.raises(ValueError, match=text):
        lone_part(per_token=False, sure=False)
    named = lone_part(per_token=False, sure=False, sequence_fields=["advantage", "extra"])
    assert named.per_token_field("advantage").tolist() == named.per_token_field("extra").tolist() == [2.0, 2]
    if dist.get_world_size() < 3:
        return
    text = "advantage must have a value per sequence or per token on all ranks of sequence_group, got one per sequence"
    with pytest.raises(ValueError, match=text):
        lone_part(per_token=dist.get_rank() == 1, sure=True)


def check_bad_input() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    group, last = dist.group.WORLD, world - 1
    n = 2 + (rank == last)

    def refuses(kind: Any, text: str, make: Any) -> None:
        with pytest.raises(kind, match=re.escape(text)):
            make()

    text = f"got 2 sequences on rank 0 and 3 on rank {last}"
    refuses(ValueError, text, lambda: uk.Batch(torch.zeros(n, 4, dtype=torch.int64), sequence_group=group))
    kind, text = (TypeError, "target must be int64") if rank == last else (RuntimeError, f"rank {last} refuses its")
    dtype = torch.int32 if rank == last else torch.int64
    refuses(kind, text, lambda: uk.Batch(torch.zeros(2, 4, dtype=dtype), sequence_group=group))
    batch = uk.Batch(torch.zeros(2, 4, dtype=torch.int64), sequence_group=group)
    logits = torch.zeros(2, 4, 3)
    loss = uk.Loss(Scaled(SFT(), TopEntropy()), uk.TokenMean())
    refuses(ValueError, "of scope 'batch' must see all tokens", lambda: uk.fused_loss(logits, batch, loss))
    scan = Tokens(batch, *torch.zeros(3, 2, 4))
    refuses(NotImplementedError, "sequence_scan must have whole sequences", lambda: scan.sequence_scan(scan.logp))


def check_all() -> None:
    check_sequences()
    check_fault_is_seen()
    check_counts()
    check_dtypes_of_a_global_batch()
    check_as_many_tokens_as_sequences()
    check_bad_input()
