"""The style of this package's plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#1d2733", "#9aa5b1", "#e4e7eb"
ACCENT, WARM = "#0b7a75", "#d1495b"


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure with this size in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def style(axes: Axes, title: str, x: str = "", y: str = "", grid: Literal["x", "y", "both"] = "both") -> None:
    """Title, labels of the axes, and lines across the plot for what is read off the axes in ``grid``."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    hidden = ["top", "right"] if grid == "both" else ["top", "right", "left"]
    axes.spines[hidden].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, length=0)
    axes.grid(axis=grid, color=GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def note(axes: Axes, text: str, at: tuple[float, float], side: Literal["right", "above"]) -> None:
    """A small text beside a point of the data."""
    right = side == "right"
    axes.annotate(
        text,
        at,
        xytext=(5, 0) if right else (0, 7),
        textcoords="offset points",
        ha="left" if right else "center",
        va="center" if right else "baseline",
        fontsize=8,
        color=INK,
    )
