"""One of two processes whose module is wrapped for data parallelism: ``python -m tests.distributed.wrapped RANK FILE``.

Every rank has data of its own, and the gradient is the mean over ranks. What a rank's own would be is computed without
a wrapper.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial
from torch.nn.parallel import DistributedDataParallel

import unirl_kernels as uk

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
    """Of the head's weight, with parameters and the batch's fields rounded to a dtype."""
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
