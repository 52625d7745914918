"""Linear heads whose weight is split over processes; run by ``tests/distributed/shards.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import unirl_kernels as uk
from tests.cases import BY_NAME, Shape
from tests.distributed.split import LOSSES, VOCAB, WIDTHS, Traffic, changed, columns_of, same_bits, shard_of
from tests.linear import WIDTH, LinearHead, budget, make_head
from unirl_kernels.head import sweep as sweep_module
from unirl_kernels.head.sweep import AtOnce, Summed
from unirl_kernels.objectives import Tokens
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import violations

SHAPE = Shape("even", "a multiple of 4 positions; a sequence of no tokens", (4, 1, 0, 3), VOCAB)
NAMES = ("loss", "d_hidden", "d_weight", "d_bias")
PLANS: list[tuple[str | None, int | None]] = [(None, None), (None, 2), ("eager", 5)]
"""Backend, and tokens per chunk."""


def whole(head: LinearHead, loss: uk.Loss | None, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of the whole head, written naively; the loss of level 1 where there is none."""
    used = LinearHead(*head.operands, head.batch).used
    leaves = [x.clone().to(dtype).requires_grad_() for x in used.operands if x is not None]
    hidden, weight, bias = leaves
    logits = hidden @ weight.t() + bias
    valid = head.batch.valid
    stats = (
        oracle.log_probs(logits, head.batch.target),
        torch.where(valid, oracle.entropy(logits), 0),
        torch.where(valid, torch.logsumexp(logits, -1), 0),
    )
    value = of_stats(stats) if loss is None else loss.composed(Tokens(head.batch, *stats), loss.weights(head.batch))
    value.backward()
    return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]


def of_stats(stats: Sequence[Tensor]) -> Tensor:
    weight = torch.linspace(-1, 1, stats[0].numel(), dtype=stats[0].dtype).view(stats[0].shape)
    return (weight * stats[0] - 0.3 * stats[1] + 0.1 * weight * stats[2]).sum()


def split(head: LinearHead, loss: uk.Loss | None, plan: uk.Plan, shard: uk.VocabShard, widths: Any) -> list[Tensor]:
    """The same, computed by the package from a shard, with the summed d_hidden."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, weight, bias = head.operands
    part = hidden.tensor_split(world, 1)[rank] if shard.hidden == "split" else hidden
    leaves = [part.clone(), columns_of(weight, widths, rank, dim=0), columns_of(bias, widths, rank)]
    h, w, b = (x.requires_grad_() for x in leaves)
    if loss is None:
        value = of_stats(uk.linear_token_stats(h, w, head.batch.target, bias=b, plan=plan, shard=shard))
    else:
        value = uk.fused_linear_loss(h, w, head.batch, loss, bias=b, plan=plan, shard=shard).loss
    value.backward()
    d_hidden = h.grad
    if shard.hidden == "partial":
        dist.all_reduce(d_hidden)
    if shard.hidden == "split":
        parts = [torch.empty_like(d_hidden) for _ in range(world)]
        dist.all_gather(parts, d_hidden.contiguous())
        d_hidden = torch.cat(parts, 1)
    return [value.detach(), d_hidden, w.grad, b.grad]


def problems(found: list[Tensor], head: LinearHead, loss: uk.Loss | None, widths: Any) -> str:
    rank = dist.get_rank()

    def own(values: list[Tensor]) -> list[Tensor]:
        value, d_hidden, d_weight, d_bias = values
        return [value, d_hidden, columns_of(d_weight, widths, rank, 0, dim=0), columns_of(d_bias, widths, rank, 0)]

    plain, truth = own(whole(head, loss, torch.float32)), own(whole(head, loss, torch.float64))
    said = []
    for name, x, p, t in zip(NAMES, found, plain, truth, strict=True):
        said += [f"{name}: {text}" for text in violations(x, p.to(x.dtype), t, condition=20)]
    return "; ".join(said)


def check_heads() -> None:
    """Every scope, in chunks of the widest shard; whole, partial and split hidden states; level 1."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for k, widths in enumerate(WIDTHS[world]):
        for hidden in ("whole", "partial", "split"):
            for j, loss in enumerate([*LOSSES, None]):
                head = make_head(SHAPE, loss or BY_NAME["sft"])
                backend, tokens = PLANS[(k + j) % len(PLANS)]
                plan = uk.Plan(backend=backend, max_chunk_bytes=budget(head, tokens, backend or "cpu"))
                made = None if loss is None else loss.make()
                found = split(head, made, plan, shard_of(widths, rank, hidden=hidden), widths)
                said = problems(found, head, made, widths)
                assert not said, f"{widths} {hidden} {loss} {plan}: {said}"
                assert same_bits(found[0])


def check_rounded_heads() -> None:
    """bf16 operands: d_hidden is summed in fp32 and rounded once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    widths = WIDTHS[world][0]
    head = make_head(SHAPE, BY_NAME["grpo"], torch.bfloat16)
    for hidden in ("whole", "split"):
        for loss in (uk.grpo(), None):
            found = split(head, loss, uk.Plan(), shard_of(widths, rank, hidden=hidden), widths)
            said = problems(found, head, loss, widths)
            assert not said, f"{hidden} {loss}: {said}"


def check_traffic() -> None:
    """16 bytes per token and the fp32 d_hidden of a chunk, once each. Split hidden states are gathered once."""
    rank, world = dist.get_rank(), dist.get_world_size()
    widths = WIDTHS[world][0]
    head = make_head(SHAPE, BY_NAME["grpo"])
    n = int(head.batch.valid.sum())
    for hidden, tokens in (("whole", 4), ("partial", None), ("split", None)):
        per_chunk = budget(LinearHead(head.hidden, head.weight[: max(widths)], None, head.batch), tokens, "cpu")
        with Traffic() as traffic:
            split(head, uk.grpo(), uk.Plan(max_chunk_bytes=per_chunk), shard_of(widths, rank, hidden=hidden), widths)
        chunks = -(-n // (tokens or n))
        of_chunk = [("all_gather_into_tensor", 16 * n // chunks)]
        of_chunk += [("all_reduce", 4 * WIDTH * n // chunks)] if hidden == "whole" else []
        expected = [("all_gather_into_tensor", 144), *of_chunk * chunks]
        if hidden == "split":
            expected.insert(1, ("all_gather_into_tensor", head.hidden.nbytes // world))
            expected.append(("reduce_scatter_tensor", head.hidden.nbytes))
        assert traffic.sent == expected, hidden


def check_compiled() -> None:
    """fullgraph: four matmuls, and one sum of d_hidden in the backward."""
    rank, world = dist.get_rank(), dist.get_world_size()
    widths = WIDTHS[world][0]
    head = make_head(SHAPE, BY_NAME["grpo"])
    for hidden in ("whole", "split"):
        shard = shard_of(widths, rank, hidden=hidden)
        part = head.hidden.tensor_split(world, 1)[rank] if hidden == "split" else head.hidden
        weight = columns_of(head.weight, widths, rank, dim=0)
        eager, compiled = ([x.clone().requires_grad_() for x in (part, weight)] for _ in range(2))

        def loss(h: Tensor, w: Tensor, shard: uk.VocabShard = shard) -> Tensor:
            return uk.fused_linear_loss(h, w, head.batch, uk.dpo(), shard=shard).loss

        loss(*eager).backward()
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*compiled).backward()
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def check_bad_input() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    last, widths = world - 1, WIDTHS[world][0]
    head = make_head(SHAPE, BY_NAME["grpo"])
    shard = shard_of(widths, rank)

    def refuses(text: str, head: LinearHead = head, plan: uk.Plan = uk.Plan(), shard: uk.VocabShard = shard) -> None:
        with pytest.raises((ValueError, RuntimeError), match=re.escape(text)):
            split(head, uk.grpo(), plan, shard, widths)

    text = "plan.max_chunk_bytes must be the same on all ranks of shard.group, got None on rank 0 and 100000 on rank "
    refuses(text + str(last), plan=uk.Plan(max_chunk_bytes=100000 if rank == last else None))
    refuses(f"the logits of one token, {4 * max(widths)} bytes, got 8", plan=uk.Plan(max_chunk_bytes=8))
    hidden, weight = head.hidden.clone().requires_grad_(rank == last), columns_of(head.weight, widths, rank, dim=0)
    with pytest.raises(ValueError, match="what requires a gradient"):
        uk.fused_linear_loss(hidden, weight, head.batch, uk.grpo(), shard=shard)
    odd = replace(head, hidden=head.hidden[:, :-1], batch=uk.Batch(head.batch.target[:, :-1], *fields(head.batch)))
    text = f"target must have a multiple of {world} tokens for hidden that is split, got 3"
    refuses(text, head=odd, shard=shard_of(widths, rank, hidden="split"))


def fields(batch: uk.Batch) -> list[Any]:
    return [batch.advantage, batch.old_logp[:, :-1], batch.ref_logp[:, :-1]]


def check_faults_are_seen() -> None:
    """Planted faults are found: a sum of d_hidden that is left out, and one that is done twice."""
    rank, world = dist.get_rank(), dist.get_world_size()
    widths, loss = WIDTHS[world][0], uk.grpo()
    head = make_head(SHAPE, BY_NAME["grpo"])
    real = sweep_module.start_all_reduce
    twice = lambda x, ranks: real(sweep_module.wait(real(x, ranks)), ranks)  # noqa: E731
    faults: list[tuple[Any, str, Any]] = [(Summed, "put", AtOnce.put), (sweep_module, "start_all_reduce", twice)]
    for owner, name, value in faults:
        with changed(owner, name, value):
            found = split(head, loss, uk.Plan(), shard_of(widths, rank), widths)
            assert "d_hidden" in problems(found, head, loss, widths), f"{name} is not seen"
