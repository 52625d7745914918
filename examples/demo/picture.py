"""The demo's results as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.picture import ACCENT, INK, MUTED, WARM, new_figure, note, style
from examples.demo.compare import FUSED, NAIVE, Row
from examples.demo.report import WORDS, Result, megabytes, milliseconds, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (ACCENT, WARM, INK)


def save_picture(result: Result, path: Path) -> None:
    """Errors, time, memory and GRPO steps, as one PNG: losses on logits on the left, on hidden states on the right."""
    linear = bool(result.linear_rows)
    title = f"Six objectives on {result.model}   V = {result.vocab}, D = {result.width}, backend {result.backend}"
    figure = new_figure(14 if linear else 12, 11 if linear else 8, title)
    # Any: matplotlib's type for a mosaic is one that a list of lists of names does not have.
    layout: list[Any] = [["errors", "time"], ["memory", "reward"], ["memory", "kl"]]
    heights: list[float] = [2, 1, 1]
    if linear:
        layout = [["errors", "linear errors"], ["time", "linear time"], ["memory", "linear memory"], ["reward", "kl"]]
        heights = [2.3, 2, 2, 1]
    axes = figure.subplot_mosaic(layout, height_ratios=heights)
    if linear:
        _draw_rows([axes[f"linear {name}"] for name in PANELS], "On hidden states", result.linear_rows)
    _draw_rows([axes[name] for name in PANELS], "On logits", result.rows)
    kl = [s.step.metrics["kl"] for s in result.grpo_steps]
    _draw_steps(axes["reward"], "GRPO: reward", "step", ACCENT, [s.reward for s in result.grpo_steps])
    _draw_steps(axes["kl"], "GRPO: KL to the frozen model", "step", WARM, kl)
    figure.savefig(path)


PANELS = ("errors", "time", "memory")


def _draw_rows(panels: Sequence[Axes], where: str, rows: Sequence[Row]) -> None:
    """The ``PANELS`` of one table's rows."""
    errors, time, memory = panels
    _draw_errors(errors, f"{where}: errors", rows)
    _draw_bars(time, f"{where}: time of loss and gradients", "ms", rows, [milliseconds(row) for row in rows])
    _draw_bars(memory, f"{where}: extra peak memory", "MB", rows, [megabytes(row) for row in rows])


def _draw_errors(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """For each algorithm the errors, each with the tolerance that bounds it."""
    least = 1e-12  # a log scale has no zero
    names = list(rows[0].checks)
    for k, (color, name) in enumerate(zip(COLORS, names, strict=False)):
        checks = [row.checks[name] for row in rows]
        places = [i + 0.28 * (k - (len(names) - 1) / 2) for i in range(len(rows))]
        values = [max(check.error, least) for check in checks]
        axes.scatter(values, places, color=color, s=30, label=WORDS[name], zorder=3)
        axes.scatter([check.tolerance for check in checks], places, color=color, marker="|", s=90, zorder=3)
    axes.scatter([], [], color=MUTED, marker="|", s=90, label="tolerance")
    style(axes, title, "distance from fp64", grid="x")
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
        note(axes, f"{_short(pair[0])} {unit}   naive {times(pair)}", (pair[0], i - 0.19), "right")
    style(axes, title, unit, grid="x")
    axes.set_xlim(0, 1.15 * max(max(p) for p in pairs))
    _label_rows(axes, rows)
    _legend(axes)


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _label_rows(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [f"{row.algorithm}  {row.equation}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _legend(axes: Axes) -> None:
    """Draw the legend beside the title, where it covers no data."""
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=4,
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
