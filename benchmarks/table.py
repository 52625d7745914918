"""The results of a run as a table: on the terminal, and in Markdown for the README."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from benchmarks.levels import level_of
from benchmarks.providers import OURS
from benchmarks.record import OK, Row, Run, title

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

QUIET = 0.05
"""The share of the processors' time that other processes may take without a note."""

WIDTH = 100
"""The width of a line of Markdown outside of tables."""


def terminal(run: Run, width: int | None = None) -> Table:
    """For the terminal: this package in bold, wrong providers in red. A narrow terminal omits some columns, and names
    them."""
    from rich.table import Table  # a machine that measures alone need not have it

    from benchmarks.terminal import LOG_WIDTH, fitting, widths

    columns = level_of(run.work).columns
    names = (*columns.left, *columns.right)
    lines = [(line, "dim") for line in columns.baselines(run)]
    for row in sorted(run.rows, key=_by_time):
        style = "bold red" if row.status != OK else "bold" if row.name == OURS else ""
        lines.append((columns.cells(run, row), style))
    texts, room = [line for line, _ in lines], width or LOG_WIDTH
    fit = fitting(names, texts, columns.dispensable, room)
    left_out = [name for k, name in enumerate(names) if k not in fit]
    unseen = tuple(f"{name.partition(',')[0]}:" for name in left_out)
    caption = "; ".join(part for part in columns.caption.split("; ") if not part.startswith(unseen))
    if left_out:
        caption += f". No room for: {', '.join(left_out)}"
    shown = Table(title=title(run.work), title_justify="left", caption=caption, caption_justify="left")
    for k, of_column in zip(fit, widths(names, texts, fit, room), strict=True):
        justify: JustifyMethod = "left" if k < len(columns.left) else "right"
        shown.add_column(names[k], justify=justify, width=of_column)
    for n, (line, style) in enumerate(lines):
        shown.add_row(*(line[k] for k in fit), style=style, end_section=n == len(lines) - len(run.rows) - 1)
    return shown


def remarks(run: Run) -> list[str]:
    """Why providers are wrong, failed or skipped, one line each (those skipped for the same reason share one), how
    long the host took for a call, and whether the machine was busy with something else."""
    lines = [f"{row.status}: {row.key}: {row.reasons[0]}" for row in run.rows if row.status != OK]
    reasons: dict[str, list[str]] = {}
    for name, reason in run.skipped.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"skipped: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    hosts = [f"{row.key} {1e6 * row.time.host:.0f}" for row in run.rows if row.time is not None and row.time.host]
    if hosts:
        lines.append(f"host, µs per call: {', '.join(hosts)}")
    if run.repeated:
        left = f", and {run.disturbed} of the {run.rounds} that count were disturbed too" if run.disturbed else ""
        lines.append(f"disturbed: other processes held calls up in {run.repeated} rounds; they were repeated{left}")
    if run.elsewhere is not None and run.elsewhere > QUIET:
        lines.append(f"noisy: other processes took {100 * run.elsewhere:.0f} % of the processors' time meanwhile")
    return lines


def markdown(run: Run) -> str:
    """For the README: the lines of the right providers; the wrong ones are listed below."""
    columns = level_of(run.work).columns
    right = (columns.cells(run, row) for row in sorted(run.rows, key=_by_time) if row.status == OK)
    aligned = ["---"] * len(columns.left) + ["---:"] * len(columns.right)
    lines = [(*columns.left, *columns.right), aligned, *columns.baselines(run), *right]
    wrong = [f"{row.key} ({row.reasons[0]})" for row in run.rows if row.status != OK]
    below = ["", textwrap.fill(f"Wrong, and not timed: {', '.join(wrong)}.", WIDTH)] if wrong else []
    return "\n".join([*map(_line, lines), *below])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_time(row: Row) -> float:
    return row.time.median if row.time is not None else float("inf")
