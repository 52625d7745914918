"""Peak memory of one call in a fresh process: ``python -m benchmarks.memory WORK [KEY SOURCE]...``.

WORK as JSON; SOURCE is that of a user's own provider, or empty. A line for each provider: bytes, or ``failed`` and why.

There, nothing that another provider left behind in an allocator or a cache hides what this one needs. On a CPU the
process that has imported everything forks for each provider: importing takes longer than a small case. A provider's
``modules`` are imported before the fork, once for all that need them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.buffers import Ring
from benchmarks.cases import Case
from benchmarks.levels import level_of
from benchmarks.measure import peak_extra_bytes
from benchmarks.own import own
from benchmarks.providers import Provider, imported
from benchmarks.selection import chosen
from benchmarks.work import Work

CHECKOUT = Path(__file__).parent.parent
# Gradients kept from one call to the next would hide that a call needs them.
KEEP_NOTHING = {"UNIRL_CPU_CACHE_BYTES": "0"}


SMALL_BYTES = 2**26
"""Up to this size of the logits, and of a head's weight, memory is measured while this process checks the providers.
Larger work might not find the memory for both at once."""


def peak_in_fresh_process(provider: Provider, work: Work) -> int:
    """Bytes that a call of the provider needs at its peak, on top of the operands.

    Raises:
        RuntimeError: when the process fails, with the last line of what it said.
    """
    with Peaks([provider], work) as peaks:
        return next(peaks.of([provider]))


class Peaks:
    """``peak_in_fresh_process`` of several providers. Small work is measured from now on, beside this process.

    Args:
        providers: all that may be asked for.
        work: what they do.
    """

    def __init__(self, providers: Sequence[Provider], work: Work) -> None:
        self._work = work
        self._answers: dict[str, str] = {}
        self.beside = list(providers) if _forks(work) and _small(work) else []
        """Those that are measured beside this process."""
        self._process = _Process(self.beside, work) if self.beside else None

    def __enter__(self) -> Peaks:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def wait(self, after_each: Callable[[], object] = lambda: None) -> None:
        """Wait for what is measured beside this process, before it disturbs."""
        for provider in self.beside:
            assert self._process is not None  # until all have answered
            self._answers[provider.key] = self._process.answer()
            after_each()
        self._stop()  # its end takes a second otherwise, in which calls are timed

    def of(self, providers: Sequence[Provider]) -> Iterator[int]:
        """Bytes of each, in their order.

        Raises:
            RuntimeError: when measuring one of them failed.
        """
        if not self._answers:
            self.wait()
        later = [provider for provider in providers if provider.key not in self._answers]
        for provider in providers:
            if provider.key in self._answers:
                yield _bytes(provider, self._answers[provider.key])
        for group in [later] if later and _forks(self._work) else [[provider] for provider in later]:
            process = _Process(group, self._work)
            try:
                for provider in group:
                    yield _bytes(provider, process.answer())
            finally:
                process.stop()


class _Process:
    """``python -m benchmarks.memory`` for some providers."""

    def __init__(self, providers: Sequence[Provider], work: Work) -> None:
        named = [text for provider in providers for text in (provider.key, provider.source)]
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(work)), *named]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._running = subprocess.Popen(
            command,
            text=True,
            cwd=CHECKOUT,
            env=os.environ | KEEP_NOTHING,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def answer(self) -> str:
        """The next line that it says, or the last one of its errors."""
        assert self._running.stdout is not None
        if said := self._running.stdout.readline().strip():
            return said
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"failed {errors[-1] if errors else 'no answer'}"

    def stop(self) -> None:
        self._running.kill()
        self._running.communicate()
        self._errors.close()


def _bytes(provider: Provider, answer: str) -> int:
    if not answer.isdigit():
        raise RuntimeError(f"measuring the memory of {provider.key} failed: {answer.removeprefix('failed ')}")
    return int(answer)


def _small(work: Work) -> bool:
    return (work.tokens + (work.hidden or 0)) * work.row_bytes <= SMALL_BYTES


def _forks(work: Work) -> bool:
    return sys.platform == "linux" and torch.device(work.device).type == "cpu"


def _provider(work: Work, key: str, source: str) -> Provider:
    return own(source, work) if source else next(p for p in chosen(work, ["all"], ["all"]) if p.key == key)


def _peak(work: Work, provider: Provider) -> int:
    inputs = level_of(work).make(work)
    case = Case(provider.bind(inputs), inputs, [Ring(x) for x in inputs.operands], provider.overwrites)
    case()
    case.renew()
    return peak_extra_bytes(case, torch.device(work.device))


def _said(work: Work, key: str, source: str) -> str:
    try:
        return str(_peak(work, _provider(work, key, source)))
    except Exception as error:  # a peer may raise anything, and whoever asked is told
        message = str(error).strip().splitlines() or [""]
        return f"failed {type(error).__name__}: {message[0]}"


def _in_fork(work: Work, key: str, source: str) -> str:
    """``_said`` by a copy of this process, which has not computed anything yet."""
    if not source:
        for module in _provider(work, key, source).modules:
            with suppress(ImportError):  # whoever binds the provider says so
                imported(module)
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
