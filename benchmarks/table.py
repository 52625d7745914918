"""The results of a run as a table: on the terminal, and in Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from benchmarks.levels import level_of
from benchmarks.providers import OURS
from benchmarks.record import OK, Row, Run, title

if TYPE_CHECKING:
    from rich.table import Table

QUIET = 0.05
"""Share of the processors' time that others may take without a word."""


def terminal(run: Run) -> Table:
    """For the terminal: ours in bold, the wrong in red."""
    from rich.table import Table  # a machine that measures alone need not have it

    columns = level_of(run.work).columns
    shown = Table(title=title(run.work), title_justify="left", caption=columns.caption, caption_justify="left")
    for name in columns.left:
        shown.add_column(name, no_wrap=True)
    for name in columns.right:
        shown.add_column(name, justify="right")
    for line in columns.baselines(run):
        shown.add_row(*line, style="dim")
    shown.add_section()
    for row in sorted(run.rows, key=_by_time):
        style = "bold red" if row.status != OK else "bold" if row.name == OURS else ""
        shown.add_row(*columns.cells(run, row), style=style)
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
    if run.elsewhere is not None and run.elsewhere > QUIET:
        lines.append(f"noisy: other processes took {100 * run.elsewhere:.0f} % of the processors' time meanwhile")
    return lines


def markdown(run: Run) -> str:
    """For the README: the same lines, the right ones only, those that are wrong below."""
    columns = level_of(run.work).columns
    right = (columns.cells(run, row) for row in sorted(run.rows, key=_by_time) if row.status == OK)
    aligned = ["---"] * len(columns.left) + ["---:"] * len(columns.right)
    lines = [(*columns.left, *columns.right), aligned, *columns.baselines(run), *right]
    wrong = [f"{row.key} ({row.reasons[0]})" for row in run.rows if row.status != OK]
    return "\n".join([*map(_line, lines), *(["", f"Wrong, and not timed: {', '.join(wrong)}."] if wrong else [])])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_time(row: Row) -> float:
    return row.time.median if row.time is not None else float("inf")
