"""``python -m benchmarks.repeated``: it names a kernel whose results are not finite, or differ between calls."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks import repeated


@pytest.mark.parametrize(
    ("call", "value", "said"),
    [
        (0, torch.nan, "gradient is not finite"),
        (1, torch.nan, "gradient has other bits in repetition 1"),
        (repeated.SMALL_REPETITIONS, 0.25, f"gradient has other bits in repetition {repeated.SMALL_REPETITIONS}"),
    ],
)
def test_a_kernel_that_races(
    call: int, value: float, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one call, in place, and one element."""
    right, calls = repeated.results, []

    def racing(logits: Tensor, batch: uk.Batch, plan: uk.Plan) -> dict[str, Tensor]:
        found = right(logits, batch, plan)
        if plan.overwrite_logits:
            calls.append(plan)
            if len(calls) == call + 1:
                found["gradient"][0, 1, 2] = value
        return found

    monkeypatch.setattr(repeated, "results", racing)
    monkeypatch.setattr(sys, "argv", ["repeated", "cpu/rows", "--small"])
    assert repeated.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["cpu/rows V=300", f"WRONG cpu/rows V=300 in place: {said}"]
    assert lines[2:] == ["cpu/rows V=2049", "cpu/rows V=2049 in place"]
