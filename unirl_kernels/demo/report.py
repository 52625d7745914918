"""The demo's results: a table, a picture, a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from unirl_kernels.demo.compare import FUSED, NAIVE, Check, Row
from unirl_kernels.demo.train import Step
from unirl_kernels.picture import ACCENT, MUTED, WARM, new_figure, note, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GrpoStep:
    """A GRPO step: what the samples earned, and what the optimisation saw."""

    reward: float
    step: Step


@dataclass(frozen=True)
class Result:
    """All that a run of the demo found."""

    model: str
    vocab: int
    backend: str
    rows: Sequence[Row]
    grpo_steps: Sequence[GrpoStep]

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        rows = [
            {
                "algorithm": row.algorithm,
                "equation": row.equation,
                "tokens": row.tokens,
                "loss": row.loss,
                "loss_error": row.loss_check.error,
                "grad_error": row.grad_check.error,
                "fused_s": row.time[FUSED].median,
                "naive_s": row.time[NAIVE].median,
                "fused_peak_bytes": row.peak_bytes[FUSED],
                "naive_peak_bytes": row.peak_bytes[NAIVE],
            }
            for row in self.rows
        ]
        steps = [{"loss": s.step.loss, "reward": s.reward, "kl": s.step.metrics["kl"]} for s in self.grpo_steps]
        return {
            "model": self.model,
            "vocab": self.vocab,
            "backend": self.backend,
            "rows": rows,
            "grpo_steps": steps,
        }

    def exceeded(self) -> list[str]:
        """The errors beyond their tolerance, one line each."""
        return [
            f"{row.algorithm}: {what} error {check.error:.2e} exceeds its tolerance {check.tolerance:.2e}"
            for row in self.rows
            for what, check in (("loss", row.loss_check), ("gradient", row.grad_check))
            if check.failed
        ]


def save_summary(result: Result, path: Path) -> None:
    path.write_text(json.dumps(result.summary(), indent=2) + "\n")


def table(result: Result) -> Table:
    """The six rows, fused / naive side by side."""
    title = f"{result.model}, V = {result.vocab}, backend {result.backend}: loss and gradient of the logits"
    shown = Table(title=title, title_justify="left", caption=CAPTION, caption_justify="left")
    shown.add_column("algorithm", style="bold")
    for name in ("equation", "data source"):
        shown.add_column(name)
    for name in ("tokens", "loss", "loss error", "grad error", "time, ms", "extra peak, MB"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        ms = (row.time[FUSED].median * 1e3, row.time[NAIVE].median * 1e3)
        mb = (row.peak_bytes[FUSED] / 1e6, row.peak_bytes[NAIVE] / 1e6)
        shown.add_row(
            row.algorithm,
            row.equation,
            row.data,
            str(row.tokens),
            f"{row.loss:.5f}",
            _check(row.loss_check),
            _check(row.grad_check),
            f"{ms[0]:.0f} / {ms[1]:.0f} [bold green]{_times(ms)}[/]",
            f"{mb[0]:.0f} / {mb[1]:.0f} [bold green]{_times(mb)}[/]",
        )
    return shown


CAPTION = (
    "errors against the fp64 oracle: loss absolute, gradient relative L2, each with its tolerance, twice the error of "
    "naive fp32 plus 4 ulp; time (median) and peak memory beyond the logits: fused / naive"
)


def _check(check: Check) -> str:
    style = "bold red" if check.failed else "green"
    return f"[{style}]{check.error:.1e}[/] [dim]≤ {check.tolerance:.1e}[/]"


def _times(pair: tuple[float, float]) -> str:
    return f"{pair[1] / pair[0]:.1f}x" if pair[0] > 0 else ""


def save_picture(result: Result, path: Path) -> None:
    """Errors, time, memory and GRPO steps, as one PNG."""
    title = f"Six objectives on the logits of {result.model}   V = {result.vocab}, backend {result.backend}"
    figure = new_figure(12, 8, title)
    axes = figure.subplot_mosaic([["errors", "time"], ["memory", "reward"], ["memory", "kl"]], height_ratios=[2, 1, 1])
    _draw_errors(axes["errors"], result.rows)
    ms = [(row.time[FUSED].median * 1e3, row.time[NAIVE].median * 1e3) for row in result.rows]
    mb = [(row.peak_bytes[FUSED] / 1e6, row.peak_bytes[NAIVE] / 1e6) for row in result.rows]
    _draw_bars(axes["time"], "Time of loss and gradient", "ms", result.rows, ms)
    _draw_bars(axes["memory"], "Peak memory beyond the logits", "MB", result.rows, mb)
    kl = [s.step.metrics["kl"] for s in result.grpo_steps]
    _draw_steps(axes["reward"], "GRPO: reward", "", ACCENT, [s.reward for s in result.grpo_steps])
    _draw_steps(axes["kl"], "GRPO: KL to the frozen model", "step", WARM, kl)
    figure.savefig(path)


def _draw_errors(axes: Axes, rows: Sequence[Row]) -> None:
    """For each algorithm the two errors, each with the tolerance that bounds it."""
    least = 1e-12  # a log scale has no zero
    for shift, color, name in ((-0.16, ACCENT, "loss"), (0.16, WARM, "gradient")):
        checks = [row.loss_check if name == "loss" else row.grad_check for row in rows]
        places = [i + shift for i in range(len(rows))]
        values = [max(check.error, least) for check in checks]
        axes.scatter(values, places, color=color, s=42, label=name, zorder=3)
        axes.scatter([check.tolerance for check in checks], places, color=color, marker="|", s=120, zorder=3)
    axes.scatter([], [], color=MUTED, marker="|", s=120, label="tolerance")
    style(axes, "Error against fp64", grid="x")
    axes.set_xscale("log")
    _label_rows(axes, rows)
    _legend(axes)


def _draw_bars(axes: Axes, title: str, unit: str, rows: Sequence[Row], pairs: Sequence[tuple[float, float]]) -> None:
    for shift, color, name, values in (
        (-0.19, ACCENT, FUSED, [p[0] for p in pairs]),
        (0.19, MUTED, NAIVE, [p[1] for p in pairs]),
    ):
        axes.barh([i + shift for i in range(len(rows))], values, height=0.36, color=color, label=name)
    for i, pair in enumerate(pairs):
        note(axes, f"{pair[0]:.3g} {unit}   naive {_times(pair)}", (pair[0], i - 0.19), "right")
    style(axes, title, unit, grid="x")
    axes.set_xlim(0, 1.15 * max(max(p) for p in pairs))
    _label_rows(axes, rows)
    _legend(axes)


def _label_rows(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [f"{row.algorithm}  {row.equation}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _legend(axes: Axes) -> None:
    """Beside the title, where no data can lie."""
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=3,
        columnspacing=1.0,
        handletextpad=0.4,
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        borderaxespad=0.2,
    )


def _draw_steps(axes: Axes, title: str, x: str, color: str, values: Sequence[float]) -> None:
    style(axes, title, x, grid="y")
    numbers = range(1, len(values) + 1)
    axes.plot(numbers, values, "o-", color=color)
    for number, value in zip(numbers, values, strict=True):
        note(axes, f"{value:.3f}", (number, value), "above")
    axes.set_xticks(numbers)
    axes.set_ylim(0, 1.35 * max(values, default=0) or 1)
    if not values:
        axes.text(0.5, 0.5, "no steps", ha="center", transform=axes.transAxes, color=MUTED)
