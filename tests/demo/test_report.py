"""The demo's tables on a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.measure import Timing
from examples.demo.compare import FUSED, NAIVE, Check, Row
from examples.demo.computations import GRAD, HIDDEN_GRAD, WEIGHT_GRAD
from examples.demo.report import Result, tables

NAMES = ("SFT", "RFT", "Online RFT", "DPO", "PPO", "GRPO")


def row(name: str, *gradients: str) -> Row:
    checks = {key: Check(1.2e-7, 3.4e-6) for key in ("loss", *gradients)}
    time = {FUSED: Timing(0.0123, 0.01, 0.02), NAIVE: Timing(0.456, 0.4, 0.5)}
    peaks = {FUSED: 123_000_000, NAIVE: 1_234_000_000}
    return Row(name, "(8), GC (11)", "samples of the old policy", 1234, -0.12345, checks, time, peaks)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_column_is_cut_off(width: int) -> None:
    of_logits, of_heads = [row(name, GRAD) for name in NAMES], [row(name, HIDDEN_GRAD, WEIGHT_GRAD) for name in NAMES]
    result = Result("SmolLM2-135M-Instruct", 49152, 576, "cpu", of_logits, of_heads, [])
    for table, checks in zip(tables(result, width), (2, 3), strict=True):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(table)
        text = console.export_text()
        assert "…" not in text
        lines = [line.rstrip() for line in text.splitlines() if line[:1] in ("│", "┃")]
        assert all(line[-1] == line[0] for line in lines)
        words = text.split()
        assert {"12", "456", "123", "1234", "-0.12345", "37.1x", "10.0x", "Online", "peak,"} <= set(words)
        assert words.count("1.2e-07") == len(NAMES) * checks
