"""The demo's results: two tables, a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from benchmarks.terminal import LOG_WIDTH, fitting, widths
from examples.demo.compare import FUSED, NAIVE, Check, Row
from examples.demo.computations import GRAD, HIDDEN_GRAD, WEIGHT_GRAD
from examples.demo.train import Step

WORDS = {"loss": "loss", GRAD: "gradient", HIDDEN_GRAD: "d_hidden", WEIGHT_GRAD: "d_weight"}
"""The checked values in words, by their names in ``Row.checks``."""


@dataclass(frozen=True)
class GrpoStep:
    """A GRPO step: rewards of the samples, and values of the optimisation step."""

    reward: float
    step: Step


@dataclass(frozen=True)
class Result:
    """All results of a run of the demo.

    Args:
        model: its name.
        vocab, width: V and D of its head.
        backend: of the fused losses.
        rows: the six losses on logits.
        linear_rows: the same on hidden states; none where the model's head needs all its logits.
        grpo_steps: in order.
    """

    model: str
    vocab: int
    width: int
    backend: str
    rows: Sequence[Row]
    linear_rows: Sequence[Row]
    grpo_steps: Sequence[GrpoStep]

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        steps = [{"loss": s.step.loss, "reward": s.reward, "kl": s.step.metrics["kl"]} for s in self.grpo_steps]
        return {
            "model": self.model,
            "vocab": self.vocab,
            "backend": self.backend,
            "rows": [_row_summary(row) for row in self.rows],
            "linear_rows": [_row_summary(row) for row in self.linear_rows],
            "grpo_steps": steps,
        }

    def exceeded(self) -> list[str]:
        """The errors beyond their tolerance, one line each."""
        return [
            f"{row.algorithm}{where}: {WORDS[name]} error {check.error:.2e} exceeds its tolerance {check.tolerance:.2e}"
            for rows, where in ((self.rows, ""), (self.linear_rows, " on hidden states"))
            for row in rows
            for name, check in row.checks.items()
            if check.failed
        ]


def _row_summary(row: Row) -> dict[str, Any]:
    return {
        "algorithm": row.algorithm,
        "equation": row.equation,
        "tokens": row.tokens,
        "loss": row.loss,
        **{f"{name}_error": check.error for name, check in row.checks.items()},
        "fused_s": row.time[FUSED].median,
        "naive_s": row.time[NAIVE].median,
        "fused_peak_bytes": row.peak_bytes[FUSED],
        "naive_peak_bytes": row.peak_bytes[NAIVE],
    }


def save_summary(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result.summary(), indent=2) + "\n")


def tables(result: Result, width: int = LOG_WIDTH) -> list[Table]:
    """Losses on logits and, where there are any, on hidden states; fused / naive side by side.

    Args:
        result: what the demo found.
        width: of the terminal.
    """
    where = f"{result.model}, V = {result.vocab}, backend {result.backend}"
    shown = [_table(f"{where}: loss and gradient of the logits", CAPTION, result.rows, width)]
    if result.linear_rows:
        title = f"{where}, D = {result.width}: loss on hidden states, and gradients of them and of the head's weight"
        shown.append(_table(title, LINEAR_CAPTION, result.linear_rows, width))
    return shown


def _table(title: str, caption: str, rows: Sequence[Row], width: int) -> Table:
    checked = [f"{WORDS[name]} error" for name in rows[0].checks]
    named = ("algorithm", "equation", "data source", "tokens", "loss", *checked, "time, ms", "extra peak, MB")
    lines = [
        (
            row.algorithm,
            row.equation,
            row.data,
            str(row.tokens),
            f"{row.loss:.5f}",
            *map(_check, row.checks.values()),
            _fused_and_naive(milliseconds(row)),
            _fused_and_naive(megabytes(row)),
        )
        for row in rows
    ]
    plain = [[Text.from_markup(cell).plain for cell in line] for line in lines]
    fit = fitting(named, plain, ("data source", "equation", "tokens"), width)
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for k, of_column in zip(fit, widths(named, plain, fit, width), strict=True):
        justify: JustifyMethod = "left" if k < WORDS_FIRST else "right"
        shown.add_column(named[k], justify=justify, width=of_column, style="bold" if k == 0 else "")
    for line in lines:
        shown.add_row(*(line[k] for k in fit))
    return shown


WORDS_FIRST = 3
"""Columns of words; those of numbers come after them."""

CAPTION = (
    "errors against the fp64 oracle: loss absolute, gradient relative L2, each with its tolerance, twice the error of "
    "naive fp32 plus 4 ulp; time (median) and peak memory beyond the logits: fused / naive"
)
LINEAR_CAPTION = (
    "naive: F.linear(hidden, weight), then the loss on the logits; fused: logits in chunks only. Errors and tolerances "
    "as above; time (median) and peak memory beyond hidden states and weight, their gradients included: fused / naive"
)


def milliseconds(row: Row) -> tuple[float, float]:
    """Median times, fused and naive."""
    return row.time[FUSED].median * 1e3, row.time[NAIVE].median * 1e3


def megabytes(row: Row) -> tuple[float, float]:
    """Peaks of memory, fused and naive."""
    return row.peak_bytes[FUSED] / 1e6, row.peak_bytes[NAIVE] / 1e6


def times(pair: tuple[float, float]) -> str:
    """The naive value divided by the fused one, as text."""
    return f"{pair[1] / pair[0]:.1f}x" if pair[0] > 0 else ""


def _fused_and_naive(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.0f} / {pair[1]:.0f} [bold green]{times(pair)}[/]"


def _check(check: Check) -> str:
    style = "bold red" if check.failed else "green"
    return f"[{style}]{check.error:.1e}[/] [dim]≤ {check.tolerance:.1e}[/]"
