"""A head whose vocabulary is split over processes, as a DTensor: supervised steps of a tiny model.

    python -m torch.distributed.run --nproc-per-node 2 examples/tensor_parallel.py

``ColwiseParallel`` splits the head; its logits are a DTensor of placement Shard(-1), of which ``uk.fused_loss`` makes
the loss of whole rows. No rank ever holds all columns.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import unirl_kernels as uk


class Model(nn.Module):
    """Predicts the next letter from the letter."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(ids))
        return logits


def train(steps: int, vocab: int = 101, width: int = 16) -> list[float]:
    """Losses of the steps, the same on every rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Model(vocab, width)
    split = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model.head, mesh, split)
    optimizer = torch.optim.Adam(model.parameters(), 0.05, foreach=False)
    ids = torch.arange(4 * 12).view(4, 12) * 7 % vocab  # every letter has one that follows
    batch = uk.Batch(uk.shift_targets(ids))
    losses = []
    for _ in range(steps):
        out = uk.fused_loss(model(ids), batch, uk.sft())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Supervised steps with a head that is split over processes.")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    losses = train(options.steps)
    if dist.get_rank() == 0:
        for step in range(0, options.steps, 5):
            print(f"step {step:3d}  loss {losses[step]:.4f}")
        print(f"last      loss {losses[-1]:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
