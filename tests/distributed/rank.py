"""One of two processes that share a head by FSDP2: ``python -m tests.distributed.rank RANK FILE``; see its test."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import unirl_kernels as uk
from tests.cases import BY_NAME, LossCase
from tests.linear import RAGGED, LinearHead, budget, fused, make_head

WORLD = 2


class LossModule(nn.Module):
    """Holds the head's parameters and computes the loss where FSDP2 has gathered them: in its forward."""

    def __init__(self, head: LinearHead) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(head.weight.clone()), nn.Parameter(head.bias.clone())

    def forward(self, hidden: Tensor, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan) -> Tensor:
        return uk.fused_linear_loss(hidden, self.weight, batch, loss, bias=self.bias, plan=plan).loss


def part_of(head: LinearHead, rank: int) -> LinearHead:
    """Every second sequence, or pair of sequences."""
    target, *fields = (head.batch.target, head.batch.advantage, head.batch.old_logp, head.batch.ref_logp)
    batch = uk.Batch(target[rank::WORLD], *(x[rank::WORLD] for x in fields))
    return LinearHead(head.hidden[rank::WORLD], head.weight, head.bias, batch)


def check(case: LossCase, tokens: int | None, rank: int, mesh: dist.DeviceMesh) -> None:
    head = make_head(RAGGED, case).to(torch.float64)
    plan = uk.Plan(max_chunk_bytes=budget(head, tokens, "cpu"))
    whole = fused(head, case.make(), plan)
    part = part_of(head, rank)
    module = fully_shard(LossModule(head), mesh=mesh)
    assert module.weight.to_local().shape[0] < head.weight.shape[0], "nothing is sharded"
    hidden = part.hidden.clone().requires_grad_()
    for steps in (1, 2):  # the second adds to the gradient of the first
        loss = module(hidden, part.batch, case.make(), plan)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        close(mean / WORLD, whole.loss)
        close(module.weight.grad.full_tensor(), steps * whole.d_weight)
        close(module.bias.grad.full_tensor(), steps * whole.d_bias)
        close(hidden.grad, steps * WORLD * whole.d_hidden[rank::WORLD])


def close(x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


def check_pieces_are_refused(mesh: dist.DeviceMesh) -> None:
    head = make_head(RAGGED, BY_NAME["grpo"])
    module = fully_shard(LossModule(head), mesh=mesh)
    for name, weight, bias in (("weight", module.weight, head.bias), ("bias", head.weight, module.bias)):
        expected = (
            f"{name} must be a whole tensor, got a DTensor: compute the loss in the forward of the module that holds "
            "the parameter, where FSDP2 has gathered it, or pass "
        )
        for call in (
            lambda w=weight, b=bias: uk.fused_linear_loss(head.hidden, w, head.batch, uk.grpo(), bias=b),
            lambda w=weight, b=bias: uk.linear_token_stats(head.hidden, w, head.batch.target, bias=b),
        ):
            with pytest.raises(ValueError, match="^" + re.escape(expected)):
                call()


def main(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, tokens in (("grpo", None), ("grpo", 1), ("dpo", 5), ("dpo", 4)):
        check(BY_NAME[name], tokens, rank, mesh)
    check_pieces_are_refused(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
