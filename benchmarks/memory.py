"""Peak memory of one call in a fresh process: ``python -m benchmarks.memory WORK KEY SOURCE``.

WORK as JSON; SOURCE is that of a user's own provider, or empty.

There, nothing that another provider left behind in an allocator or a cache hides what this one needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.buffers import Ring
from benchmarks.cases import Case
from benchmarks.levels import level_of
from benchmarks.measure import peak_extra_bytes
from benchmarks.own import own
from benchmarks.providers import Provider
from benchmarks.selection import chosen
from benchmarks.work import Work

CHECKOUT = Path(__file__).parent.parent
# Gradients kept from one call to the next would hide that a call needs them.
KEEP_NOTHING = {"UNIRL_CPU_CACHE_BYTES": "0"}


def peak_in_fresh_process(provider: Provider, work: Work) -> int:
    """Bytes that a call of the provider needs at its peak, on top of the operands.

    Raises:
        RuntimeError: when the process fails, with the last line of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(work)), provider.key, provider.source]
    environment = os.environ | KEEP_NOTHING
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"measuring the memory of {provider.key} failed: {said[-1]}")
    return int(done.stdout.split()[-1])


def _peak(work: Work, key: str, source: str) -> int:
    known = chosen(work, ["all"], ["all"])
    provider = own(source, work) if source else next(p for p in known if p.key == key)
    inputs = level_of(work).make(work)
    case = Case(provider.bind(inputs), inputs, [Ring(x) for x in inputs.operands], provider.overwrites)
    case()
    case.renew()
    return peak_extra_bytes(case, torch.device(work.device))


if __name__ == "__main__":
    sys.stdout.write(f"{_peak(Work(**json.loads(sys.argv[1])), *sys.argv[2:])}\n")
