"""Whether one-pass kernels give the same bits in every call: ``python -m benchmarks.repeated BACKEND/KERNEL...``.

GRPO with its gradient, in fresh memory and in place, for vocabularies that are split in different ways; on an
accelerator also on two streams at once. A kernel whose threads, programs or launches race gives other bits, or NaN, in
some of the calls. The first result must be finite, the others equal to it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

import unirl_kernels as uk

TOKENS, SMALL_TOKENS = 2048, 4
VOCABULARIES = [32000, 50257, 100352, 128256, 129280, 151936, 262144]
SMALL_VOCABULARIES = [300, 2049]
REPETITIONS, SMALL_REPETITIONS = 30, 3


def made(tokens: int, vocab: int, device: str) -> tuple[Tensor, uk.Batch]:
    random = torch.Generator(device).manual_seed(vocab)
    logits = torch.randn(1, tokens, vocab, device=device, dtype=torch.bfloat16, generator=random)
    target = torch.randint(0, vocab, (1, tokens), device=device, generator=random)
    logp = torch.full((1, tokens), -10.0, device=device)
    return logits, uk.Batch(target, torch.ones(1, device=device), logp, logp)


def results(logits: Tensor, batch: uk.Batch, plan: uk.Plan) -> dict[str, Tensor]:
    """What one call returns, and the gradient of its loss."""
    leaf = logits.detach().requires_grad_()
    # Only a tensor that is not a leaf can be overwritten.
    computed = leaf.clone() if plan.overwrite_logits else leaf
    output = uk.fused_loss(computed, batch, uk.grpo(), plan=plan)
    output.loss.backward()
    assert leaf.grad is not None
    return {"loss": output.loss.detach(), "logp": output.logp, "entropy": output.entropy, "gradient": leaf.grad}


def wrong(logits: Tensor, batch: uk.Batch, plan: uk.Plan, repetitions: int) -> str:
    """What is wrong with the results of repeated calls; empty if nothing is."""
    first = results(logits, batch, plan)
    for name, x in first.items():
        if not x.isfinite().all():
            return f"{name} is not finite"
    for k in range(repetitions):
        for found in at_once(logits, batch, plan):
            for name, x in found.items():
                if not torch.equal(x, first[name]):
                    return f"{name} has other bits in repetition {k + 1}"
    return ""


def at_once(logits: Tensor, batch: uk.Batch, plan: uk.Plan) -> list[dict[str, Tensor]]:
    """The results of a call, or on an accelerator of one on each of two streams."""
    if logits.device.type == "cpu":
        return [results(logits, batch, plan)]
    torch.cuda.synchronize()
    found = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            found.append(results(logits, batch, plan))
    torch.cuda.synchronize()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="BACKEND/KERNEL")
    parser.add_argument("--small", action="store_true", help="on the CPU, to try the command itself")
    options = parser.parse_args()
    device, tokens, vocabularies, repetitions = "cuda", TOKENS, VOCABULARIES, REPETITIONS
    if options.small:
        device, tokens, vocabularies, repetitions = "cpu", SMALL_TOKENS, SMALL_VOCABULARIES, SMALL_REPETITIONS
    code = 0
    for vocab in vocabularies:
        logits, batch = made(tokens, vocab, device)
        for name in options.kernels:
            backend, _, kernel = name.partition("/")
            if reason := uk.backends.unavailable(backend, logits.device):
                print(f"{'left out:' if options.small else 'WRONG'} {name}: {reason}", flush=True)
                code |= not options.small
                continue
            for in_place in (False, True):
                work = f"{name} V={vocab}{' in place' if in_place else ''}"
                try:
                    plan = uk.Plan(backend, kernel, overwrite_logits=in_place)
                    found = wrong(logits, batch, plan, repetitions)
                except RuntimeError as error:  # go on with the next kernel
                    found = str(error).splitlines()[0]
                print(f"WRONG {work}: {found}" if found else work, flush=True)
                code |= bool(found)
    return code


if __name__ == "__main__":
    sys.exit(main())
