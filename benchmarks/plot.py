"""Plots of saved results, made only from the records."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from benchmarks.levels import level_of
from benchmarks.picture import ACCENT, INK, WARM, new_figure, note, style
from benchmarks.providers import OURS
from benchmarks.record import Record, Row, Run, three_digits, title
from unirl_kernels.commands.cli import CommandFailed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS_COLORS = (ACCENT, "#12b5ac", "#06423f", "#5fd0c8")
PEER_COLORS = (WARM, "#edae49", "#00798c", "#66507d", "#8d6a4f", "#30638e", "#b56576", "#6a994e")
LEAST_SWEPT = 3
"""From this many on, works that differ in only one size form a sweep."""


def plot(files: Sequence[Path], folder: Path) -> int:
    """Plot every record: one picture for its sweeps, one for each other piece of work.

    Raises:
        CommandFailed: when a file cannot be read or a picture not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            runs = Record.load(file).runs
            sweeps = {axis: list(_sweeps(runs, axis)) for axis in ("vocab", "tokens")}
            swept = [run for groups in sweeps.values() for group in groups for run in group]
            if swept:
                draw_sweeps(sweeps).savefig(folder / f"{file.stem}-sweep.png")
            for n, run in enumerate(run for run in runs if run not in swept):
                draw_run(run).savefig(folder / f"{file.stem}{f'-{n + 1}' if n else ''}.png")
    except OSError as error:
        raise CommandFailed(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise CommandFailed(str(error)) from error
    return 0


def _sweeps(runs: Sequence[Run], axis: str) -> Iterable[list[Run]]:
    """Runs that differ in only one size."""

    def others(run: Run) -> str:
        return repr({name: value for name, value in asdict(run.work).items() if name != axis})

    for _, group in itertools.groupby(sorted(runs, key=others), key=others):
        members = sorted(group, key=lambda run: int(getattr(run.work, axis)))
        if len(members) >= LEAST_SWEPT:
            yield members


def draw_sweeps(sweeps: dict[str, list[list[Run]]]) -> Figure:
    """Time against vocabulary and against tokens, with the floor."""
    panels = [(axis, group) for axis, groups in sweeps.items() for group in groups]
    figure = new_figure(6.2 * len(panels), 5)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    colors = _colors(run for _, group in panels for run in group)
    for panel, (axis, group) in zip(axes, panels, strict=True):
        _draw_sweep(panel, axis, group, colors)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _draw_sweep(axes: Axes, axis: str, runs: Sequence[Run], colors: dict[str, str]) -> None:
    sizes = [getattr(run.work, axis) for run in runs]
    for key, color in colors.items():
        rows = [next((row for row in run.rows if row.key == key), None) for run in runs]
        points = [(n, row.time) for n, row in zip(sizes, rows, strict=True) if row is not None and row.time is not None]
        marks = "o-" if key.startswith(OURS) else "s--"
        axes.plot([n for n, _ in points], [t.median * 1e3 for _, t in points], marks, color=color, label=key, ms=4)
    floors = [run.floor_seconds * 1e3 for run in runs]
    axes.plot(sizes, floors, color=INK, lw=1.2, ls=":", label="floor, at the bandwidth of copy_")
    work = runs[0].work
    fixed = f"T = {work.tokens}" if axis == "vocab" else f"V = {work.vocab}"
    names = {"vocab": "vocabulary, V", "tokens": "tokens, T"}
    style(axes, f"{work.loss}, {work.mode}, {work.dtype}, {fixed}", names[axis], "ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(n) for n in sizes], rotation=45, fontsize=8)
    axes.minorticks_off()


def draw_run(run: Run) -> Figure:
    """Time with the floor, memory, and error against time."""
    right = sorted((row for row in run.rows if row.time is not None), key=_median)
    figure = new_figure(3 * 5.2, 1.6 + 0.36 * max(6, len(right)), title(run.work))
    axes = figure.subplots(1, 3)
    colors = _colors([run])
    _draw_bars(axes[0], "Time", "ms", right, colors, lambda row: _median(row) * 1e3)
    axes[0].axvline(run.floor_seconds * 1e3, color=INK, lw=1.2, ls=":")
    axes[0].annotate("floor", (run.floor_seconds * 1e3, -0.5), fontsize=8, color=INK, ha="center", va="bottom")
    columns = level_of(run.work).columns
    memory = f"Peak memory beyond {columns.beyond}"
    _draw_bars(axes[1], memory, "MB", right, colors, lambda row: (columns.extra_bytes(run, row) or 0) / 1e6)
    axes[1].set_yticks([])
    _draw_errors(axes[2], right, colors)
    return figure


def _draw_bars(
    axes: Axes, name: str, unit: str, rows: Sequence[Row], colors: dict[str, str], value: Callable[[Row], float]
) -> None:
    values = [value(row) for row in rows]
    axes.barh(range(len(rows)), values, height=0.62, color=[colors[row.key] for row in rows])
    for i, x in enumerate(values):
        note(axes, three_digits(x), (x, i), "right")
    style(axes, name, unit)
    axes.set_yticks(range(len(rows)), [row.key for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.9)
    axes.set_xlim(0, 1.15 * max(values, default=1) or 1)


def _draw_errors(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
    for row in rows:
        error = next((x for x in (row.gradient_error, row.d_weight_error, row.logp_error) if x is not None), None)
        if error:
            axes.scatter(_median(row) * 1e3, error, color=colors[row.key], s=46, zorder=3)
    of_weight = any(row.d_weight_error is not None for row in rows)
    of_gradient = of_weight or any(row.gradient_error is not None for row in rows)
    gradient = f"gradient error{' of the weight' if of_weight else ''}, relative L2"
    name = gradient if of_gradient else "log-probability error, nats"
    style(axes, "Error against fp64, against time", "ms", name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FormatStrFormatter("%g"))


def _median(row: Row) -> float:
    assert row.time is not None
    return row.time.median


def _colors(runs: Iterable[Run]) -> dict[str, str]:
    """A colour for each provider: shades of one colour for this package, other colours for the rest."""
    keys = list(dict.fromkeys(row.key for run in runs for row in run.rows if row.time is not None))
    ours, peers = itertools.cycle(OURS_COLORS), itertools.cycle(PEER_COLORS)
    return {key: next(ours if key.startswith(OURS) else peers) for key in keys}
