"""The progress of a long command: a bar for each stage while it runs, and a line when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

LOG_WIDTH = 200
"""The width of a log file, so large that cells of a table fit on one line."""


def open_console() -> Console:
    """The terminal, or a log file."""
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def fitting(names: Sequence[str], lines: Sequence[Sequence[str]], dispensable: Sequence[str], width: int) -> list[int]:
    """Which columns of a table fit a terminal without breaking a word of a cell.

    Args:
        names: of the columns.
        lines: the cells.
        dispensable: names of columns that are left out where there is no room, the first of them first.
        width: of the terminal.
    """
    widths = {name: _longest_word([name, *(line[k] for line in lines)]) + CELL_FRAME for k, name in enumerate(names)}
    for name in dispensable:
        if sum(widths.values()) + 1 <= width:
            break
        widths.pop(name, None)
    return [k for k, name in enumerate(names) if name in widths]


def widths(names: Sequence[str], lines: Sequence[Sequence[str]], fit: Sequence[int], width: int) -> list[int]:
    """Of the columns that fit, as wide as their words at least; the first ones get the room that is left, so that their
    cells take fewer lines. Without them rich cuts the table off at the right."""
    cells = [[names[k], *(line[k] for line in lines)] for k in fit]
    found = [_longest_word(column) for column in cells]
    spare = width - 1 - sum(found) - CELL_FRAME * len(found)
    for k, column in enumerate(cells):
        more = min(max(map(len, column)) - found[k], max(0, spare))
        found[k] += more
        spare -= more
    return found


CELL_FRAME = 3
"""The width of a cell's padding and rule."""


def _longest_word(texts: Sequence[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)


class Stages:
    """The stages of a run."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a stage while it runs; yields what to call after each of its ``total`` steps, if they can be counted."""
        start = time.perf_counter()
        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
        if total is not None:
            columns.append(MofNCompleteColumn())
        hidden = not self.console.is_terminal  # a log file gets only the line
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True, disable=hidden) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)
        self.done(title, time.perf_counter() - start)

    def done(self, title: str, seconds: float) -> None:
        self.console.print(f"[green]✓[/] {title} [dim]{seconds:.1f} s[/]", highlight=False)
