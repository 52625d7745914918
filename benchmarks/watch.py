"""Which kernel is at work, so that one that loses the device or does not return is named and left out afterwards."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

from benchmarks.inputs import Inputs, Values
from benchmarks.providers import Function, Provider

LIMITS = {"cuda": 60.0, "cpu": 900.0}
"""Seconds that a call may take on a device; the first one compiles."""

LOST = 3
"""Exit code of a process that cannot go on, after which another one can."""


def label(provider: Provider) -> str:
    return f"{provider.name} {provider.kernel}"


class Watch:
    """Ends the process where a kernel does not return: a wait for a device cannot be interrupted.

    Args:
        file: names the kernels to be left out and says why, for later processes too.
        limit: seconds within which a kernel has to return.
    """

    def __init__(self, file: Path, limit: float) -> None:
        self._file, self._limit = file, limit
        self._now: tuple[str, float] | None = None  # which, and since when
        Thread(target=self._look, daemon=True).start()

    @property
    def at_work(self) -> str:
        """The kernel that was called last; empty after ``rest``."""
        now = self._now
        return now[0] if now else ""

    def rest(self) -> None:
        """What runs from now on is no kernel's work."""
        self._now = None

    def over(self, provider: Provider) -> Provider:
        """The provider, watched."""

        def bind(inputs: Inputs) -> Function:
            return self._noted(label(provider), provider.bind(inputs))

        return replace(provider, bind=bind)

    def _noted(self, name: str, function: Function) -> Callable[..., Values]:
        def call(*operands: object) -> Values:
            self._now = name, time.monotonic()
            return function(*operands)

        return call

    def left_out(self) -> dict[str, str]:
        """Kernels to be left out, each with the reason."""
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return dict(line.split(": ", 1) for line in lines)

    def blame(self, reason: str) -> str:
        """Leave the kernel at work out from now on, and say so."""
        if not self.at_work:
            return f"no kernel was at work: {reason}"
        said = f"{self.at_work}: {reason}"
        with self._file.open("a") as file:
            file.write(said + "\n")
        return said

    def _look(self) -> None:
        while True:
            time.sleep(self._limit / 20)
            now = self._now
            if now is not None and time.monotonic() - now[1] > self._limit:
                faulthandler.dump_traceback()
                print(f"WRONG {self.blame(f'does not return within {self._limit:.0f} s')}", flush=True)
                os._exit(LOST)
