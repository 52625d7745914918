"""Peak memory of one call in a fresh process: ``python -m benchmarks.memory WORK``.

WORK as JSON. Each line that it reads is a key of a provider and the source of a user's own, or nothing, as JSON; each
line that it writes is bytes, or ``failed`` and why.

There, nothing that another provider left behind in an allocator or a cache hides what this one needs. On a CPU the
process forks for each provider: importing and ``Provider.prepare`` take longer than a small case. The command's own
process has done both before it computes anything; a copy of it, made then, is as good as a new process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.buffers import Ring
from benchmarks.cases import Case
from benchmarks.levels import level_of
from benchmarks.measure import peak_extra_bytes
from benchmarks.own import own
from benchmarks.providers import Provider, prepare
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
    return next(Peaks(work, beside=False).of([provider]))


class Peaks:
    """``peak_in_fresh_process`` of several providers.

    Args:
        work: what they do.
        beside: measure small work beside this process, from ``ask`` to ``wait``.
        fresh: this process has computed nothing yet.
    """

    def __init__(self, work: Work, *, beside: bool, fresh: bool = False) -> None:
        self._work = work
        self._answers: dict[str, str] = {}
        self.asked: list[Provider] = []
        """Providers that are measured in another process."""
        self._process = _Process(work, fresh) if beside and _forks(work) and _small(work) else None

    def __enter__(self) -> Peaks:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def ask(self, provider: Provider) -> None:
        """Start to measure a provider in another process, if small work is measured there."""
        if self._process is not None:
            self._process.ask(provider)
            self.asked.append(provider)

    def wait(self, after_each: Callable[[], object]) -> None:
        """Wait until the other process has finished, so that it does not disturb timed calls."""
        for provider in self.asked:
            assert self._process is not None  # until all have answered
            self._answers[provider.key] = self._process.answer()
            after_each()
        self._stop()  # its end takes a second otherwise, in which calls are timed

    def of(self, providers: Sequence[Provider]) -> Iterator[int]:
        """Bytes of each, in their order.

        Raises:
            RuntimeError: when measuring one of them failed.
        """
        if self.asked:
            yield from (_bytes(provider, self._answers[provider.key]) for provider in providers)
            return
        for group in [providers] if _forks(self._work) else [[provider] for provider in providers]:
            process = _Process(self._work)
            try:
                for provider in group:
                    process.ask(provider)
                    yield _bytes(provider, process.answer())
            finally:
                process.stop()


class _Process:
    """Measures providers, one after the other.

    Args:
        work: what they do.
        fresh: this process has computed nothing yet: a copy of it will do.
    """

    def __init__(self, work: Work, fresh: bool = False) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._running = (_Copy if fresh else _New)(work, self._errors)

    def ask(self, provider: Provider) -> None:
        assert self._running.stdin is not None
        with suppress(BrokenPipeError):  # ``answer`` says why
            self._running.stdin.write(f"{json.dumps([provider.key, provider.source])}\n".encode())

    def answer(self) -> str:
        """The next line that it says, or the last one of its errors."""
        assert self._running.stdout is not None
        if said := self._running.stdout.readline().decode().strip():
            return said
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"failed {errors[-1] if errors else 'no answer'}"

    def stop(self) -> None:
        self._running.kill()
        self._running.wait()
        for file in (self._running.stdin, self._running.stdout, self._errors):
            assert file is not None
            file.close()


class _New(subprocess.Popen[bytes]):
    """A new process."""

    def __init__(self, work: Work, errors: IO[bytes]) -> None:
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(work))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "bufsize": 0}
        super().__init__(command, cwd=CHECKOUT, env=os.environ | KEEP_NOTHING, **pipes)


class _Copy:
    """A copy of this process, used as a ``Popen``."""

    def __init__(self, work: Work, errors: IO[bytes]) -> None:
        requests, stdin = os.pipe()
        stdout, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(stdin)  # else this process would not see the end of the requests
            os.environ.update(KEEP_NOTHING)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for standard in (1, 2):
                os.dup2(errors.fileno(), standard)
            with _left_at_once(), os.fdopen(requests) as lines, os.fdopen(answers, "w") as told:
                _answer(work, lines, told)
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self._pid, 0)


@contextmanager
def _left_at_once() -> Iterator[None]:
    """End a copied process at the end of the block, without the exit handlers of the original."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


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
    case = Case(provider.bind(inputs), inputs, [Ring(x, copies=2) for x in inputs.operands], provider.overwrites)
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
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with _left_at_once():
            os.write(writer, _said(work, key, source).encode())
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    return said or f"failed with status {status}"


def _answer(work: Work, requests: Iterable[str], answers: IO[str]) -> None:
    ask = _in_fork if _forks(work) else _said
    for line in requests:
        key, source = json.loads(line)
        if not source:
            prepare([_provider(work, key, source)], torch.device(work.device))
        answers.write(f"{ask(work, key, source)}\n")
        answers.flush()


if __name__ == "__main__":
    _answer(Work(**json.loads(sys.argv[1])), sys.stdin, sys.stdout)
