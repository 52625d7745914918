"""DTensors whose vocabulary is split; run by ``tests/distributed/shards.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.distributed.split import CASES, VOCAB, make
from tests.distributed.split_heads import SHAPE
from tests.linear import fused, make_head


def check_logits(mesh: dist.DeviceMesh) -> None:
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    logits = logits.double()
    x = logits.clone().requires_grad_()
    expected = uk.fused_loss(x, batch, uk.grpo())
    expected.loss.backward()
    split = distribute_tensor(logits, mesh, [Shard(-1)]).requires_grad_()
    found = uk.fused_loss(split, batch, uk.grpo())
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(split.grad.full_tensor(), x.grad)
    for a, b in (
        (uk.token_stats(split, batch.target).entropy, expected.entropy),
        (uk.token_observations(split, batch.target).argmax, uk.token_observations(x, batch.target).argmax),
    ):
        torch.testing.assert_close(a.detach(), b)
    advice = r"logits must be a whole tensor, got a DTensor: .* full_tensor\(grad_placements=\[Partial\('avg'\)\]"
    for placement in (Shard(0), Shard(1), Replicate(), Partial()):
        with pytest.raises(ValueError, match=advice):
            uk.token_stats(distribute_tensor(logits, mesh, [placement]), batch.target)


def check_heads(mesh: dist.DeviceMesh) -> None:
    head = make_head(SHAPE, BY_NAME["dpo"]).to(torch.float64)
    expected = fused(head, uk.dpo())

    def split(x: Tensor, placement: Placement) -> Tensor:
        return distribute_tensor(x, mesh, [placement]).requires_grad_()

    hidden, weight, bias = split(head.hidden, Replicate()), split(head.weight, Shard(0)), split(head.bias, Shard(0))
    out = uk.fused_linear_loss(hidden, weight, head.batch, uk.dpo(), bias=bias)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.loss)
    for x, d in ((hidden, expected.d_hidden), (weight, expected.d_weight), (bias, expected.d_bias)):
        torch.testing.assert_close(x.grad.full_tensor(), d)
    stats = uk.linear_token_stats(hidden, weight, head.batch.target, bias=bias)
    torch.testing.assert_close(stats.logp.detach(), expected.logp)
    # What FSDP2 has looks the same, but each rank has other tokens.
    for wrong in (head.hidden, split(head.hidden, Shard(0))):
        with pytest.raises(ValueError, match="must be a whole tensor, got a DTensor"):
            uk.linear_token_stats(wrong, weight, head.batch.target, bias=bias)


def check_shards_of_fsdp2(mesh: dist.DeviceMesh) -> None:
    """The loss of all ranks' tokens from FSDP2's own shards of the weight, which is never gathered."""
    rank, world = dist.get_rank(), dist.get_world_size()
    head = make_head(SHAPE, BY_NAME["grpo"]).to(torch.float64)
    expected = fused(replace(head, bias=None), uk.grpo())
    module = nn.Linear(head.weight.shape[1], VOCAB, bias=False, dtype=torch.float64)
    module.weight.data.copy_(head.weight)
    fully_shard(module, mesh=mesh)
    local = module.weight.to_local()
    start = min(rank * -(-VOCAB // world), VOCAB)
    shard = uk.VocabShard(mesh.get_group(), start, VOCAB, hidden="split")
    hidden = head.hidden.chunk(world, 1)[rank].clone().requires_grad_()
    out = uk.fused_linear_loss(hidden, local, head.batch, uk.grpo(), shard=shard)
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.loss)
    torch.testing.assert_close(hidden.grad, expected.d_hidden.chunk(world, 1)[rank])
    torch.testing.assert_close(module.weight.grad.full_tensor(), expected.d_weight)


def check_all() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    check_logits(mesh)
    check_heads(mesh)
    check_shards_of_fsdp2(mesh)
