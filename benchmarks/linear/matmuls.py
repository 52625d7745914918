"""Every matmul on this CPU, beside torch's matmuls: ``python -m benchmarks.linear.matmuls [FILE.json]``.

For each shape and dtype, in interleaved rounds: three ``torch.mm`` (in bf16 their results are rounded to it), the three
matmuls of each of ``cpu.matmul_variants`` on the tokens of one chunk, and GRPO with the gradients of hidden states and
weight with each. Times are ratios to the three ``torch.mm`` of the same round. They decide on the table in
``csrc/cpu/matmul_variants.cpp``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import unirl_kernels as uk
from benchmarks import hardware
from benchmarks.buffers import Ring
from benchmarks.linear.floor import BareMatmuls
from benchmarks.linear.inputs import make
from benchmarks.measure import Timing, interleaved_times
from benchmarks.work import DTYPES, Work
from unirl_kernels.backends import cpu
from unirl_kernels.head.chunks import rows_per_chunk

SHAPES = ((2048, 576, 49152), (1024, 2048, 32000), (4096, 2048, 32000))
"""T, D, V."""

ROUNDS = 7
CPU = torch.device("cpu")
TORCH = "torch.mm"

Calls = dict[str, Callable[[], object]]


def work_of(shape: tuple[int, int, int], dtype: str) -> Work:
    tokens, hidden, vocab = shape
    return Work(loss="grpo", mode="fused", tokens=tokens, hidden=hidden, vocab=vocab, dtype=dtype, device="cpu")


def variants_of(dtype: str) -> list[str]:
    """Those that differ: operands of other dtypes than bf16 are multiplied in fp32."""
    return [variant for variant in cpu.matmul_variants() if dtype == "bf16" or variant.endswith("fp32")]


def heads(work: Work) -> tuple[Calls, Calls]:
    """torch's matmuls; and loss and gradients in each variant."""
    inputs = make(work)
    rings = [Ring(operand) for operand in inputs.operands]

    def head(variant: str) -> Callable[[], object]:
        def call() -> object:
            hidden, weight = (ring.take().requires_grad_() for ring in rings)
            with cpu.forced_matmuls(variant):
                loss = uk.fused_linear_loss(hidden, weight, inputs.batch, work.recipe, plan=uk.Plan("cpu")).loss
                return torch.autograd.grad(loss, (hidden, weight))

        return call

    return {TORCH: BareMatmuls(work, rings)}, {f"{variant} head": head(variant) for variant in variants_of(work.dtype)}


def matmuls(work: Work) -> Calls:
    """The bare matmuls of one chunk in each variant."""
    assert work.hidden is not None
    dtype, d, vocab = DTYPES[work.dtype], work.hidden, work.vocab
    n = min(work.tokens, rows_per_chunk(4 * vocab, CPU, None))
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(vocab, d) / d**0.5).to(dtype)
    logits, d_weight, of_weight = torch.empty(n, vocab), torch.empty(vocab, d), cpu.NativeMatmuls(weight)

    def three(variant: str) -> Callable[[], object]:
        def call() -> None:
            with cpu.forced_matmuls(variant):
                of_weight.logits(hidden, None, logits)
                of_weight.d_hidden(logits)
                of_weight.add_d_weight(logits, hidden, d_weight, first=True)

        return call

    return {f"{variant} matmuls": three(variant) for variant in variants_of(work.dtype)}


def measured(work: Work, rounds: int) -> dict[str, Any]:
    """Times, operations per second, and ratios to torch's matmuls."""
    assert work.hidden is not None
    torch_mm, of_heads = heads(work)
    of_matmuls = matmuls(work)
    times = interleaved_times(torch_mm | of_matmuls | of_heads, CPU, rounds=rounds)
    tokens = dict.fromkeys(of_matmuls, min(work.tokens, rows_per_chunk(4 * work.vocab, CPU, None)))
    base = times[TORCH].median / work.tokens

    def row(name: str, time: Timing) -> dict[str, float]:
        per_token = time.median / tokens.get(name, work.tokens)
        flops = 6 * work.hidden * work.vocab if work.hidden else 0
        return {"seconds": time.median, "flops": flops / per_token, "torch_mm": per_token / base}

    shape = {"tokens": work.tokens, "hidden": work.hidden, "vocab": work.vocab, "dtype": work.dtype}
    return {**shape, "rows": {name: row(name, time) for name, time in times.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="where to save the results")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    options = parser.parse_args(arguments)
    runs, elsewhere = [], hardware.Elsewhere()
    print(f"{cpu.report()['core']}, {torch.get_num_threads()} threads; {cpu.report()['matmuls']}")
    for shape in SHAPES:
        for dtype in options.dtypes:
            runs.append(measured(work_of(shape, dtype), options.rounds))
            print("\nT x D x V =", " x ".join(map(str, shape)), dtype)
            for name, row in runs[-1]["rows"].items():
                print(f"  {name:<20} {row['flops'] / 1e9:7.0f} Gflop/s  {row['torch_mm']:6.2f} x torch.mm", flush=True)
    share = elsewhere.share()
    print(f"\nother processes: {'unknown' if share is None else f'{share:.0%}'} of the processors' time")
    if options.file is not None:
        machine = {**hardware.hardware(CPU), **hardware.versions(), "core": cpu.report()["core"]}
        found = {"date": hardware.now(), "machine": machine, "other_processes": share, "runs": runs}
        options.file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
