"""One of two processes whose module is wrapped for data parallelism: ``python -m tests.distributed.wrapped RANK FILE``.

Every rank has data of its own, and the gradient is the mean over ranks. What a rank's own would be is computed without
a wrapper.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial
from torch.nn.parallel import DistributedDataParallel

import unirl_kernels as uk
from tests.distributed.split import Traffic, changed
from unirl_kernels.ranks.collectives import Gathered, reduce_scatter

WORLD, V, D = 2, 31, 8
RANK: int


class Model(nn.Module):
    """Returns all of the output, as trainers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor, batch: uk.Batch) -> uk.LossOutput:
        return uk.fused_linear_loss(self.embedding(ids), self.head.weight, batch, uk.grpo())


def data() -> tuple[Tensor, uk.Batch]:
    """Another batch on each rank."""
    random = torch.Generator().manual_seed(RANK)
    ids = torch.randint(0, V, (2, 7), generator=random)
    old_logp, ref_logp = (-4 * torch.rand(2, 7, generator=random) for _ in range(2))
    return ids, uk.Batch(uk.shift_targets(ids), torch.randn(2, generator=random), old_logp, ref_logp)


def mean_over_ranks(gradient: Tensor) -> Tensor:
    total = gradient.float()
    dist.all_reduce(total)
    return total / WORLD


def expected_gradient(dtype: torch.dtype = torch.float32) -> Tensor:
    """The gradient of the head's weight, with parameters and the batch's fields rounded to a dtype."""
    ids, batch = data()
    fields = (batch.advantage, batch.old_logp, batch.ref_logp)
    model = Model().to(dtype)
    rounded = uk.Batch(batch.target, *(x.to(dtype) for x in fields if x is not None))
    model(ids, rounded).loss.backward()
    assert model.head.weight.grad is not None
    return mean_over_ranks(model.head.weight.grad)


def check_ddp(static_graph: bool) -> None:
    model = DistributedDataParallel(Model(), static_graph=static_graph)
    for steps in (1, 2):
        model(*data()).loss.backward()
        torch.testing.assert_close(model.module.head.weight.grad, steps * expected_gradient())


def check_fsdp2(policy: MixedPrecisionPolicy, dtype: torch.dtype) -> None:
    """The policy converts the tensors of a batch that it finds among the arguments, and those of the output."""
    model = fully_shard(Model(), mp_policy=policy)
    out = model(*data())
    out.loss.backward()
    assert out.loss.dtype == (policy.output_dtype or torch.float32)
    torch.testing.assert_close(model.head.weight.grad.full_tensor(), expected_gradient(dtype))


def check_whole_weight_of_shards() -> None:
    """What the error says of a sharded weight gives the mean over ranks."""
    layer = fully_shard(Model().head)
    model = Model()
    ids, batch = data()
    hidden = model.embedding(ids)
    with pytest.raises(ValueError, match=r"full_tensor\(grad_placements=\[Partial\('avg'\)\]\)"):
        uk.fused_linear_loss(hidden, layer.weight, batch, uk.grpo())
    whole = layer.weight.full_tensor(grad_placements=[Partial("avg")])
    uk.fused_linear_loss(hidden, whole, batch, uk.grpo()).loss.backward()
    torch.testing.assert_close(layer.weight.grad.full_tensor(), expected_gradient())


class Body(Model):
    """A model whose head is not called."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.embedding(ids)


def sharded_body() -> Body:
    body = Body()
    fully_shard(body.head)
    return fully_shard(body)


def from_shards(body: Body, ids: Tensor, batch: uk.Batch, loss: uk.Loss, level: int = 2) -> Tensor:
    """The loss of all ranks from the shards of the weight, and its backward."""
    shard = uk.VocabShard.of_fsdp(body.head.weight, body)
    hidden, weight = body(ids), body.head.weight.to_local()
    if batch.cu_seqlens is not None:
        hidden = hidden.flatten(0, 1)
    everyone = uk.global_batch(batch, dist.group.WORLD)
    if level == 2:
        value = uk.fused_linear_loss(hidden, weight, everyone, loss, shard=shard).loss
    else:
        value = -uk.linear_token_stats(hidden, weight, everyone.target, shard=shard).logp.sum() / everyone.valid.sum()
    value.backward()
    return value.detach()


def packed(batch: uk.Batch) -> uk.Batch:
    ends = torch.arange(0, batch.target.numel() + 1, batch.target.shape[1])
    fields = (batch.advantage, batch.old_logp.flatten(), batch.ref_logp.flatten())
    return uk.Batch(batch.target.flatten(), *fields, ends)


def mean_loss(ids: Tensor, batch: uk.Batch, loss: uk.Loss) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of the plain way of FSDP2: the loss of each rank in the forward of the whole model."""
    torch.manual_seed(0)

    class Whole(Model):
        def forward(self, ids: Tensor, batch: uk.Batch) -> Tensor:  # type: ignore[override]
            return uk.fused_linear_loss(self.embedding(ids), self.head.weight, batch, loss).loss

    model = fully_shard(Whole())
    value = model(ids, batch)
    value.backward()
    return mean_over_ranks(value.detach()), gradients_of(model)


def gradients_of(model: Model) -> list[Tensor]:
    return [x.grad.full_tensor() for x in (model.embedding.weight, model.head.weight)]


def check_loss_from_shards() -> None:
    """The gradients of the plain way, also when they are added to; the weight is never gathered."""
    ids, batch = data()
    pairs = replace(batch, pairs="interleaved")
    cases = [(batch, uk.grpo(), 2), (packed(batch), uk.grpo(), 2), (pairs, uk.dpo(), 2)]
    cases.append((batch, uk.Loss(uk.sft().objective, uk.TokenMean()), 1))
    for own, loss, level in cases:
        expected, plain = mean_loss(ids, replace(batch, pairs=own.pairs), loss)
        body = sharded_body()
        for steps in (1, 2):
            value = from_shards(body, ids, own, loss, level)
            torch.testing.assert_close(value, expected)
            for found, gradient in zip(gradients_of(body), plain, strict=True):
                torch.testing.assert_close(found, steps * gradient)
    with changed(Gathered, "backward", staticmethod(lambda ctx, d: (reduce_scatter(d, ctx.group), None, None, None))):
        body = sharded_body()
        from_shards(body, ids, batch, uk.grpo())
        _, plain = mean_loss(ids, batch, uk.grpo())
        assert not torch.allclose(gradients_of(body)[0], plain[0]), "a factor left out is not seen"


def check_traffic_from_shards() -> None:
    """Hidden states and their gradient instead of the weight and its gradient."""
    ids, batch = data()
    body, everyone = sharded_body(), uk.global_batch(batch, dist.group.WORLD)
    hidden = body(ids).detach().requires_grad_()
    shard = uk.VocabShard.of_fsdp(body.head.weight, body)
    with Traffic() as traffic:
        uk.fused_linear_loss(hidden, body.head.weight.to_local(), everyone, uk.grpo(), shard=shard).loss.backward()
    tokens = int(everyone.valid.sum())
    sent = [("all_gather_into_tensor", n) for n in (144, hidden.nbytes, 16 * tokens)]
    assert traffic.sent == [*sent, ("reduce_scatter_tensor", WORLD * hidden.nbytes)]


def check_refused_shards() -> None:
    ids, batch = data()
    body = sharded_body()

    def refuses(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
        with pytest.raises(kind, match=re.escape(text)):
            call()

    weight = body.head.weight
    text = "weight must be a DTensor, as fully_shard keeps it, got Tensor: FSDP2 has gathered it"
    refuses(TypeError, text, lambda: uk.VocabShard.of_fsdp(weight.full_tensor(), body))
    refuses(TypeError, "model must be a torch.nn.Module", lambda: uk.VocabShard.of_fsdp(weight, None))
    refuses(ValueError, "got one that model does not hold", lambda: uk.VocabShard.of_fsdp(weight, body.embedding))
    tied = Body()
    tied.head.weight = tied.embedding.weight
    fully_shard(tied)
    text = "a parameter of the head alone, got one that is tied: embedding.weight, head.weight"
    refuses(ValueError, text, lambda: uk.VocabShard.of_fsdp(tied.head.weight, tied))
    hybrid = Body()
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard")))
    text = "weight must be Shard(0) on a mesh of one dimension, got (Replicate(), Shard(dim=0))"
    refuses(ValueError, text, lambda: uk.VocabShard.of_fsdp(hybrid.head.weight, hybrid))
    refuses(ValueError, "batch.pairs must be 'interleaved'", lambda: from_shards(body, ids, batch, uk.dpo()))
    short = uk.Batch(batch.target[:, : 7 - RANK])
    text = "on all ranks, got target int64 (2, 7), pairs 'halves' on rank 0 and target int64 (2, 6)"
    refuses(ValueError, text, lambda: uk.global_batch(short, dist.group.WORLD))
    kind, text = (TypeError, "batch must be a Batch, got NoneType") if RANK else (ValueError, "and no batch on rank 1")
    refuses(kind, text, lambda: uk.global_batch(None if RANK else batch, dist.group.WORLD))
    text = "target must have a multiple of 2 sequences for hidden that is split, got 1"
    shard = uk.VocabShard.of_fsdp(weight, body)
    head = (torch.zeros(1, 7, D), weight.to_local())
    refuses(ValueError, text, lambda: uk.linear_token_stats(*head, batch.target[:1], shard=shard))


def main(rank: int, file: str) -> None:
    global RANK
    RANK = rank
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    init_device_mesh("cpu", (WORLD,))
    for static_graph in (False, True):
        check_ddp(static_graph)
    check_fsdp2(MixedPrecisionPolicy(), torch.float32)
    rounded = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    check_fsdp2(MixedPrecisionPolicy(**rounded), torch.bfloat16)
    check_fsdp2(MixedPrecisionPolicy(**rounded, output_dtype=torch.float32), torch.bfloat16)
    check_whole_weight_of_shards()
    check_loss_from_shards()
    check_traffic_from_shards()
    check_refused_shards()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
