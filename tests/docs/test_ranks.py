"""Python blocks of docs/ranks.md run as pasted."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import unirl_kernels as uk
from tests import ROOT

PAGE = ROOT / "docs" / "ranks.md"
PYTHON = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))


class Small(torch.nn.Module):
    """Hidden states, and a head that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


def test_python_blocks_run_as_pasted() -> None:
    """In a group of one rank, whose weight is padded: the losses are those without padding."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        hidden, weight, target = torch.randn(2, 3, 4), torch.randn(10, 4), torch.randint(0, 7, (2, 3))
        batch = uk.Batch(target, torch.randn(2), ref_logp=-2 * torch.ones(2, 3))
        leaf = hidden.clone().requires_grad_()
        mesh = dist.init_device_mesh("cpu", (1,))
        model = Small()
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        names: dict[str, Any] = {
            "model": model,
            "head": model.head,
            "input_ids": target,
            "torch": torch,
            "uk": uk,
            "group": dist.group.WORLD,
            "rank": 0,
            "V": 7,
            "data_parallel_size": 1,
            "hidden": leaf,
            "weight": weight,
            "target": target,
            "batch": batch,
        }
        exec(compile(PYTHON, str(PAGE), "exec"), names)
        plain = hidden.clone().requires_grad_()
        loss = uk.Loss(uk.grpo().objective, uk.TokenMean())
        expected = uk.fused_linear_loss(plain, weight[:7], batch, loss)
        (expected.loss + uk.fused_linear_loss(plain, weight[:7], batch, uk.grpo()).loss).backward()
        torch.testing.assert_close(names["out"].loss, expected.loss)
        torch.testing.assert_close(names["stats"].logp, expected.logp)
        torch.testing.assert_close(leaf.grad, plain.grad)
        assert all(x.grad is not None and x.grad.full_tensor().any() for x in model.parameters())
    finally:
        dist.destroy_process_group()
