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
        """Whether Triton's interpreter runs the kernels. A row takes some 30 ms, so tests use fewer cases."""
        return self.backend == "triton" and INTERPRETED

    @property
    def emulated(self) -> bool:
        """Whether CUDA kernels run on the CPU, see ``tests/backends/cuda/emulator``."""
        return self.backend == "cuda" and self.device == "cpu"

    def plan(self, **choices: bool) -> Plan:
        """The plan that names this backend and kernel."""
        return Plan(backend=self.backend, kernel=self.kernel, **choices)

    def runs(self, loss: LossCase) -> bool:
        """Whether the kernel runs the loss: one-pass kernels only run losses of token scope."""
        return self.kernel == COMPOSED or loss.make().scope == "token"

    def takes(self, shape: Shape) -> bool:
        return not self.interpreted or shape.n_logits <= INTERPRETED_LOGITS

    def need(self, dtype: torch.dtype) -> None:
        """Skip the test if the backend has no kernels for ``dtype``."""
        if self.backend == "cuda" and dtype == torch.float64:
            pytest.skip("has no fp64 kernels: they are for the eager backend")

    def need_observations(self) -> None:
        """Skip the test if the backend has no kernel for observations. ``tests/backends/cuda`` tests the error."""
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
