"""The columns of a level's table, and the format of figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.measure import Timing
from benchmarks.record import OK, Row, Run, three_digits

BLANK = ""


@dataclass(frozen=True)
class Columns:
    """The table of a level.

    Args:
        left, right: names of the columns, by alignment.
        caption: their meaning.
        cells: a provider's line, without markup. A provider that is wrong or failed has no time.
        baselines: the lines of the baselines: what the machine does at best.
        extra_bytes: the memory that a provider needs in addition; None if not measured.
        beyond: to what it is in addition.
        dispensable: names of columns that a narrow terminal omits, in this order.
    """

    left: Sequence[str]
    right: Sequence[str]
    caption: str
    cells: Callable[[Run, Row], list[str]]
    baselines: Callable[[Run], list[list[str]]]
    extra_bytes: Callable[[Run, Row], int | None]
    beyond: str
    dispensable: Sequence[str]


def timed(row: Row) -> list[str]:
    """Median and middle range of a provider's time, or its status if it is not right."""
    if row.time is not None:
        return timing(row.time)
    return [row.status if row.status != OK else BLANK, BLANK]


def timing(time: Timing) -> list[str]:
    """Median and middle range."""
    return [three_digits(time.median * 1e3), f"{three_digits(time.p20 * 1e3)} – {three_digits(time.p80 * 1e3)}"]


def faster(run: Run, row: Row) -> str:
    """How many times faster than eager PyTorch."""
    speedup = run.speedup(row)
    return BLANK if speedup is None else f"{speedup:.1f}"


def megabytes(x: int | None) -> str:
    return BLANK if x is None else f"{x / 1e6:.0f}"


def error(x: float | None) -> str:
    return BLANK if x is None else f"{x:.0e}" if x == 0 else f"{x:.1e}"
