"""The results of a run as a table: on the terminal, and in Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from unirl_kernels.bench.providers import OURS
from unirl_kernels.bench.record import OK, Row, Run, three_digits, title
from unirl_kernels.measure import Timing

LEFT = ("provider", "kernel", "gradient")
RIGHT = (
    "time, ms",
    "p20 – p80",
    "floor, MB",
    "% of copy",
    "× eager",
    "extra memory, MB",
    "logp error",
    "gradient error",
)
CAPTION = (
    "time: median; floor: memory traffic that no kernel can do without; % of copy: the floor's traffic per second, of "
    "what copy_ of the same tensor reaches in this run; extra memory: peak on top of the logits, in a fresh process; "
    "errors against fp64: logp largest, nats; gradient relative L2"
)
BLANK = ""
QUIET = 0.05
"""Share of the processors' time that others may take without a word."""


def cells(run: Run, row: Row) -> list[str]:
    """A provider's line, without markup. One that is wrong or failed gets no credit for its time."""
    median, middle, percent, faster = BLANK, BLANK, BLANK, BLANK
    if row.time is not None:
        median, middle = _ms(row.time), _middle(row.time)
        percent = f"{100 * run.floor_seconds / row.time.median:.0f}"
        speedup = run.speedup(row)
        faster = BLANK if speedup is None else f"{speedup:.1f}"
    elif row.status != OK:
        median = row.status
    return [
        row.name,
        row.kernel,
        ("in place" if row.overwrites else "fresh") if run.work.has_gradient else BLANK,
        median,
        middle,
        three_digits(run.floor_bytes / 1e6),
        percent,
        faster,
        BLANK if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.0f}",
        _error(row.logp_error),
        _error(row.gradient_error),
    ]


def baselines(run: Run) -> list[list[str]]:
    """What the machine does at best: a read and a write, and a read."""
    times = (("copy_", run.copy, 2), ("sum", run.sum, 1))
    return [
        ["torch", name, BLANK, _ms(time), _middle(time)]
        + [three_digits(n * run.work.logits_bytes / 1e6), f"{100 * n * run.copy.median / (2 * time.median):.0f}"]
        + [BLANK] * 4
        for name, time, n in times
    ]


def _ms(time: Timing) -> str:
    return three_digits(time.median * 1e3)


def _middle(time: Timing) -> str:
    return f"{three_digits(time.p20 * 1e3)} – {three_digits(time.p80 * 1e3)}"


def _error(x: float | None) -> str:
    return BLANK if x is None else f"{x:.0e}" if x == 0 else f"{x:.1e}"


def terminal(run: Run) -> Table:
    """For the terminal: ours in bold, the wrong in red."""
    shown = Table(title=title(run.work), title_justify="left", caption=CAPTION, caption_justify="left")
    for name in LEFT:
        shown.add_column(name, no_wrap=True)
    for name in RIGHT:
        shown.add_column(name, justify="right")
    for line in baselines(run):
        shown.add_row(*line, style="dim")
    shown.add_section()
    for row in sorted(run.rows, key=_by_time):
        style = "bold red" if row.status != OK else "bold" if row.name == OURS else ""
        shown.add_row(*cells(run, row), style=style)
    return shown


def remarks(run: Run) -> list[str]:
    """Why providers are wrong, failed or skipped, one line each (those skipped for the same reason share one), and
    whether the machine was busy with something else."""
    lines = [f"{row.status}: {row.key}: {row.reasons[0]}" for row in run.rows if row.status != OK]
    reasons: dict[str, list[str]] = {}
    for name, reason in run.skipped.items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"skipped: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if run.elsewhere is not None and run.elsewhere > QUIET:
        lines.append(f"noisy: other processes took {100 * run.elsewhere:.0f} % of the processors' time meanwhile")
    return lines


def markdown(run: Run) -> str:
    """For the README: the same lines, the right ones only, those that are wrong below."""
    names = (*LEFT, *RIGHT)
    lines = [*baselines(run), *(cells(run, row) for row in sorted(run.rows, key=_by_time) if row.status == OK)]
    wrong = [f"{row.key} ({row.reasons[0]})" for row in run.rows if row.status != OK]
    table = [_line(names), _line(["---"] * len(LEFT) + ["---:"] * len(RIGHT)), *map(_line, lines)]
    return "\n".join([*table, *(["", f"Wrong, and not timed: {', '.join(wrong)}."] if wrong else [])])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_time(row: Row) -> float:
    return row.time.median if row.time is not None else float("inf")
