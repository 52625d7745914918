"""Every kernel of a backend on little work, to be run under a sanitizer: ``python -m benchmarks.sanitized BACKEND``.

Kernels of ``triton`` read beside a row that does not start at a multiple of 16 bytes, within the same 16 bytes; a
sanitizer may take that for an error, so they get rows that do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

import unirl_kernels as uk
from unirl_kernels.backends import COMPOSED, load

DTYPES = (torch.float32, torch.bfloat16)
ALIGNED = ((4096, 0), (32000, 0), (151936, 0), (4096, 64))
"""V, and the number of elements between two rows."""
ODD = ((1, 0), (7, 0), (2049, 0), (50257, 0), (4097, 3), (151936, 1))


def layouts(backend: str, few: bool) -> Iterator[tuple[int, int]]:
    yield from (ALIGNED[:1] if few else ALIGNED)
    if backend != "triton":
        yield from (ODD[2:3] if few else ODD)


def make(vocab: int, between: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, uk.Batch]:
    memory = torch.randn(2, 3, vocab + between, dtype=dtype).to(device)
    target = torch.randint(0, vocab, (2, 3))
    target[0, 1] = uk.IGNORE
    target = target.to(device)
    advantage, old_logp, ref_logp = torch.randn(2), -torch.rand(2, 3), -torch.rand(2, 3)
    batch = uk.Batch(target, advantage.to(device), old_logp.to(device), ref_logp.to(device))
    return memory[..., :vocab], batch


def run(backend: str, logits: torch.Tensor, batch: uk.Batch) -> None:
    """One pass, in fresh memory and in place; statistics, and their gradient."""
    for kernel in (*load(backend).KERNELS, COMPOSED):
        for overwrite in (False, True):
            leaf = logits.detach().requires_grad_()
            computed = leaf.detach().clone().requires_grad_() * 1 if overwrite else leaf
            plan = uk.Plan(backend, kernel, overwrite_logits=overwrite)
            (3 * uk.fused_loss(computed, batch, uk.grpo(), plan=plan).loss).backward()
    leaf = logits.detach().requires_grad_()
    stats = uk.token_stats(leaf, batch.target, plan=uk.Plan(backend))
    (stats.logp.sum() + stats.entropy.sum() + stats.lse.sum()).backward()


def head(backend: str, device: str) -> None:
    shapes = (2, 3, 64), (2048, 64)
    hidden, weight = (torch.randn(*shape, device=device).bfloat16().requires_grad_() for shape in shapes)
    _, batch = make(2048, 0, torch.float32, device)
    plan = uk.Plan(backend, max_chunk_bytes=4 * 2048 * 6)
    uk.fused_linear_loss(hidden, weight, batch, uk.grpo(), plan=plan).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="one layout of a kind")
    options = parser.parse_args()
    for dtype in DTYPES[1:] if options.few else DTYPES:
        for layout in layouts(options.backend, options.few):
            run(options.backend, *make(*layout, dtype, options.device))
            print(options.backend, dtype, *layout, flush=True)
    head(options.backend, options.device)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("all kernels ran", flush=True)


if __name__ == "__main__":
    main()
