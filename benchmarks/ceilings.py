"""Ceilings of a machine, to compare kernels with: ``python -m benchmarks.ceilings FILE``.

A copy and a read of memory, in bytes per second; a matmul of bf16 operands into bf16, into fp32, and added to an fp32
matrix (``addmm`` with beta = 1), in operations per second. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.measure import interleaved_times

BYTES = 2**31
"""Size of the tensor that is copied and read: larger than every cache."""

SHAPE = (4096, 4096, 131072)
"""T, D, V of a linear head."""

ROUNDS = 15

Ceiling = tuple[Callable[[], object], float]


def calls(device: torch.device, size: int, shape: tuple[int, int, int]) -> dict[str, Ceiling]:
    """Each ceiling's call, with its number of bytes or operations."""
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    copied = torch.empty_like(source)
    t, d, v = shape
    hidden, weight = (torch.randn(n, d, dtype=torch.bfloat16, device=device) for n in (t, v))
    into_bf16 = torch.empty(t, v, dtype=torch.bfloat16, device=device)
    found: dict[str, Ceiling] = {
        "copy": (lambda: copied.copy_(source), 2 * size),
        "read": (lambda: source.view(torch.int32).amax(), size),
        "mm into bf16": (lambda: torch.mm(hidden, weight.t(), out=into_bf16), 2 * t * d * v),
    }
    if device.type == "cuda":  # a CPU has no matmul of bf16 operands into fp32
        into_fp32 = torch.zeros(t, v, dtype=torch.float32, device=device)
        d_weight = torch.zeros(v, d, dtype=torch.float32, device=device)
        wide: dict[str, Any] = {"out_dtype": torch.float32}
        found["mm into fp32"] = (lambda: torch.mm(hidden, weight.t(), **wide, out=into_fp32), 2 * t * d * v)
        found["addmm with beta 1"] = (
            lambda: torch.addmm(d_weight, into_bf16.t(), hidden, beta=1, **wide, out=d_weight),
            2 * t * d * v,
        )
    return found


def those_that_run(measured: dict[str, Ceiling]) -> dict[str, Ceiling]:
    """The calls that this torch and this device support; prints the others."""
    found = {}
    for name, (call, amount) in measured.items():
        try:
            call()
        except RuntimeError as error:
            print(f"FAILED {name}: {error}".splitlines()[0], flush=True)
        else:
            found[name] = call, amount
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--small", action="store_true", help="on the CPU, to try the command itself")
    options = parser.parse_args()
    device = torch.device("cpu" if options.small else "cuda")
    measured = calls(device, 2**16, (16, 16, 64)) if options.small else calls(device, BYTES, SHAPE)
    rounds = 2 if options.small else ROUNDS
    asked, measured = len(measured), those_that_run(measured)
    times = interleaved_times({name: call for name, (call, _) in measured.items()}, device, rounds=rounds)
    rates = {name: amount / times[name].median for name, (_, amount) in measured.items()}
    for name, rate in rates.items():
        print(f"{name:<18} {rate / 1e12:8.3f} T{'flop' if 'mm' in name else 'B'}/s", flush=True)
    machine = {**hardware.hardware(device), **hardware.versions()}
    options.file.write_text(json.dumps({"date": hardware.now(), "machine": machine, "per_second": rates}, indent=1))
    return int(len(measured) < asked)


if __name__ == "__main__":
    sys.exit(main())
