"""Each one-pass kernel once, to be run under a profiler: ``python -m benchmarks.profiled BACKEND/KERNEL...``."""

from __future__ import annotations

import argparse
import sys

import torch

import unirl_kernels as uk

TOKENS, VOCAB = 2048, 151936


def run(backend: str, kernel: str, device: str, tokens: int, vocab: int) -> None:
    """One GRPO loss with its gradient, after a first call that compiles."""
    logits = torch.randn(1, tokens, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(0, vocab, (1, tokens), device=device)
    logp = torch.full((1, tokens), -10.0, device=device)
    batch = uk.Batch(target, torch.ones(1, device=device), logp, logp)
    for _ in range(2):
        uk.fused_loss(logits, batch, uk.grpo(), plan=uk.Plan(backend, kernel)).loss.backward()
        logits.grad = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="+", metavar="BACKEND/KERNEL")
    parser.add_argument("--small", action="store_true", help="on the CPU, to try the command itself")
    options = parser.parse_args()
    device, tokens, vocab = ("cpu", 4, 300) if options.small else ("cuda", TOKENS, VOCAB)
    code = 0
    for name in options.kernels:
        backend, _, kernel = name.partition("/")
        try:
            run(backend, kernel, device, tokens, vocab)
        except RuntimeError as error:  # go on with the next kernel
            print(f"WRONG {name}: {error}".splitlines()[0], flush=True)
            code = 1
        else:
            print(name, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
