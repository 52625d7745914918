"""The loss head of a trainer three ways: what ``trl_head`` and ``verl_head`` share."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import hardware
from benchmarks.arguments import at_least
from benchmarks.measure import interleaved_times, peak_extra_bytes
from benchmarks.memory import CHECKOUT, KEEP_NOTHING

PRIVATE = ("rounds", "out", "memory_of")
"""Options that do not change the work."""


class Head(Protocol):
    """A micro-batch, and the trainer that computes its loss."""

    def step(self, way: str) -> Callable[[], tuple[float, float]]:
        """A call that computes loss and gradient, and returns the loss and the norm of the gradient."""


def run(
    module: str,
    description: str | None,
    ways: Sequence[str],
    head_of: Callable[[argparse.Namespace], Head],
    add_options: Callable[[argparse.ArgumentParser], object],
) -> None:
    """The command.

    Args:
        module: its name in ``benchmarks``.
        description: of the command.
        ways: the trainer's own first, then ``patch`` and ``fuse``.
        head_of: makes the micro-batch of the options.
        add_options: adds what only this trainer has.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add_options(parser)
    add("--sequences", type=at_least(2), default=4, help="of the micro-batch")
    add("--length", type=at_least(1), default=256, help="of a completion")
    add("--hidden", type=at_least(1), default=576, help="size of a hidden state; SmolLM2-135M's")
    add("--vocab", type=at_least(2), default=49152, help="size of the vocabulary; SmolLM2's")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matmuls' operands; bf16 by autocast")
    add("--rounds", type=at_least(2), default=9, help="timed calls of each way")
    add("--out", type=Path, metavar="FILE.json", help="where to save the record")
    add("--memory-of", choices=ways, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        call = head_of(options).step(options.memory_of)
        call()
        sys.stdout.write(f"{peak_extra_bytes(call, torch.device('cpu'))}\n")
        return
    found = measure(f"benchmarks.{module}", ways, head_of(options), options)
    sys.stdout.write(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(module: str, ways: Sequence[str], head: Head, options: argparse.Namespace) -> dict[str, Any]:
    """Let each way run once and note its values, then time them, then measure their memory."""
    calls = {way: head.step(way) for way in ways}
    values = {way: call() for way, call in calls.items()}
    elsewhere = hardware.Elsewhere()
    times = interleaved_times(calls, torch.device("cpu"), rounds=options.rounds)
    share = elsewhere.share()
    own = ways[0]
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": hardware.now(),
        "commit": hardware.commit(),
        "versions": hardware.versions(),
        "hardware": hardware.hardware(torch.device("cpu")),
        "work": {name: x for name, x in vars(options).items() if name not in PRIVATE},
        "rounds": options.rounds,
        "elsewhere": share,
        "loss_and_gradient_norm": values,
        "seconds": {way: asdict(time) for way, time in times.items()},
        "peak_extra_bytes": {way: _peak(module, way) for way in ways},
        "fuse_by_patch": times["fuse"].median / times["patch"].median,
        f"fuse_by_{own}": times["fuse"].median / times[own].median,
    }


def _peak(module: str, way: str) -> int:
    """Runs in a separate process."""
    command = [sys.executable, "-m", module, *sys.argv[1:], "--memory-of", way]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=CHECKOUT, env=os.environ | KEEP_NOTHING, check=True
    )
    return int(done.stdout.split()[-1])


def table(found: Mapping[str, Any]) -> str:
    """The record in Markdown."""
    lines = ["| way | ms | by patch | peak MB |", "| --- | ---: | ---: | ---: |"]
    seconds, peaks = found["seconds"], found["peak_extra_bytes"]
    for way, time in seconds.items():
        ratio = time["median"] / seconds["patch"]["median"]
        lines.append(f"| {way} | {1e3 * time['median']:.0f} | {ratio:.2f} | {peaks[way] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"
