"""Peak memory of one call in a fresh process: ``python -m benchmarks.memory WORK [KEY SOURCE]...``.

WORK as JSON; SOURCE is that of a user's own provider, or empty. A line for each provider: bytes, or ``failed`` and why.

There, nothing that another provider left behind in an allocator or a cache hides what this one needs. On a CPU the
process that has imported everything forks for each provider: importing takes longer than a small case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
    return next(peaks_in_fresh_processes([provider], work))


def peaks_in_fresh_processes(providers: Sequence[Provider], work: Work) -> Iterator[int]:
    """``peak_in_fresh_process`` of each provider, in their order."""
    together = list(providers) if _forks(work) else []
    for group in [together] if together else [[provider] for provider in providers]:
        named = [text for provider in group for text in (provider.key, provider.source)]
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(work)), *named]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = os.environ | KEEP_NOTHING
        with subprocess.Popen(command, text=True, cwd=CHECKOUT, env=environment, **pipes) as running:  # type: ignore[call-overload]
            for provider in group:
                said = running.stdout.readline().strip()
                if not said.isdigit():
                    running.kill()
                    errors = running.stderr.read().strip().splitlines()
                    reason = said.removeprefix("failed ") or (errors[-1] if errors else "no answer")
                    raise RuntimeError(f"measuring the memory of {provider.key} failed: {reason}")
                yield int(said)


def _forks(work: Work) -> bool:
    return sys.platform == "linux" and torch.device(work.device).type == "cpu"


def _peak(work: Work, key: str, source: str) -> int:
    known = chosen(work, ["all"], ["all"])
    provider = own(source, work) if source else next(p for p in known if p.key == key)
    inputs = level_of(work).make(work)
    case = Case(provider.bind(inputs), inputs, [Ring(x) for x in inputs.operands], provider.overwrites)
    case()
    case.renew()
    return peak_extra_bytes(case, torch.device(work.device))


def _said(work: Work, key: str, source: str) -> str:
    try:
        return str(_peak(work, key, source))
    except Exception as error:  # a peer may raise anything, and whoever asked is told
        message = str(error).strip().splitlines() or [""]
        return f"failed {type(error).__name__}: {message[0]}"


def _in_fork(work: Work, key: str, source: str) -> str:
    """``_said`` by a copy of this process, which has not computed anything yet."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, _said(work, key, source).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    return said or f"failed with status {status}"


def main(arguments: Sequence[str]) -> None:
    work = Work(**json.loads(arguments[0]))
    ask = _in_fork if _forks(work) else _said
    for key, source in zip(arguments[1::2], arguments[2::2], strict=True):
        sys.stdout.write(f"{ask(work, key, source)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
