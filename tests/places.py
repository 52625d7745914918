"""The backends, kernels and devices that every case runs on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from unirl_kernels import Plan
from unirl_kernels.backends import COMPOSED, load

INTERPRETED = not torch.cuda.is_available()
INTERPRETED_LOGITS = 350_000
"""Triton's interpreter takes about 0.6 us per logit and sweep; larger cases are left to a GPU."""


@dataclass(frozen=True)
class Place:
    backend: str
    kernel: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.kernel}-{self.device}"

    def plan(self, **choices: bool) -> Plan:
        """This backend and kernel."""
        return Plan(backend=self.backend, kernel=self.kernel, **choices)

    def skip_unless_it_runs(self, scope: str) -> None:
        if scope != "token" and self.kernel != COMPOSED:
            pytest.skip(f"objectives of {scope} scope are composed")

    def takes(self, n_logits: int) -> bool:
        return not (self.backend == "triton" and INTERPRETED and n_logits > INTERPRETED_LOGITS)


def _kernels(backend: str, device: str) -> list[Place]:
    return [Place(backend, kernel, device) for kernel in (*load(backend).KERNELS, COMPOSED)]


PLACES = [*_kernels("eager", "cpu"), *_kernels("cpu", "cpu"), *_kernels("triton", "cpu" if INTERPRETED else "cuda")]
if not INTERPRETED:
    PLACES += _kernels("eager", "cuda")
