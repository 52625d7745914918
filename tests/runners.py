"""The backends, kernels and devices that every case runs on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.cases import LossCase, Shape
from unirl_kernels import Plan
from unirl_kernels.backends import COMPOSED, load, unavailable

INTERPRETED = not torch.cuda.is_available()
INTERPRETED_LOGITS = 350_000
"""Triton's interpreter takes about 0.6 us per logit and sweep; larger cases are left to a GPU."""


@dataclass(frozen=True)
class Runner:
    backend: str
    kernel: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.kernel}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """A row takes some 30 ms whatever its length: cases are few, each for its own reason."""
        return self.backend == "triton" and INTERPRETED

    @property
    def emulated(self) -> bool:
        """CUDA kernels without a GPU, see ``tests/backends/cuda/emulator``."""
        return self.backend == "cuda" and self.device == "cpu"

    def plan(self, **choices: bool) -> Plan:
        """This backend and kernel."""
        return Plan(backend=self.backend, kernel=self.kernel, **choices)

    def runs(self, loss: LossCase) -> bool:
        """Objectives of pair scope are composed."""
        return self.kernel == COMPOSED or loss.make().scope == "token"

    def takes(self, shape: Shape) -> bool:
        return not self.interpreted or shape.n_logits <= INTERPRETED_LOGITS

    def need(self, dtype: torch.dtype) -> None:
        """Skip where the backend does not compute in ``dtype``."""
        if self.backend == "cuda" and dtype == torch.float64:
            pytest.skip("has no fp64 kernels: they are for the eager backend")

    def need_observations(self) -> None:
        """Skip where the backend has no kernel for observations; ``backends/cuda`` tests the error."""
        if self.backend == "cuda":
            pytest.skip("has no kernel for observations, and says so")


def _kernels(backend: str, device: str) -> list[Runner]:
    return [Runner(backend, kernel, device) for kernel in (*load(backend).KERNELS, COMPOSED)]


DEVICES = ["cpu"] if INTERPRETED else ["cpu", "cuda"]
RUNNERS = [*_kernels("eager", "cpu"), *_kernels("cpu", "cpu"), *_kernels("triton", "cpu" if INTERPRETED else "cuda")]
if INTERPRETED:
    RUNNERS += _kernels("cuda", "cpu")
else:
    RUNNERS += _kernels("eager", "cuda")
    if unavailable("cuda", torch.device("cuda")) is None:
        RUNNERS += _kernels("cuda", "cuda")
