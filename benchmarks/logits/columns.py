"""The table of work on logits."""

from __future__ import annotations

from benchmarks.columns import BLANK, Columns, error, faster, megabytes, timed, timing
from benchmarks.record import Row, Run, three_digits


def cells(run: Run, row: Row) -> list[str]:
    return [
        row.name,
        row.kernel,
        ("in place" if row.overwrites else "fresh") if run.work.has_gradient else BLANK,
        *timed(row),
        _floor(run.floor_bytes or 0),
        BLANK if row.time is None else f"{100 * run.floor_seconds / row.time.median:.0f}",
        faster(run, row),
        megabytes(extra_bytes(run, row)),
        error(row.logp_error),
        error(row.gradient_error),
    ]


def _floor(traffic: int) -> str:
    return three_digits(traffic / 1e6)


def baselines(run: Run) -> list[list[str]]:
    """A read and a write, and a read."""
    assert run.copy is not None
    assert run.sum is not None
    return [
        ["torch", name, BLANK, *timing(time), _floor(n * run.work.logits_bytes)]
        + [f"{100 * n * run.copy.median / (2 * time.median):.0f}"]
        + [BLANK] * 4
        for name, time, n in (("copy_", run.copy, 2), ("sum", run.sum, 1))
    ]


def extra_bytes(run: Run, row: Row) -> int | None:
    return row.peak_extra_bytes


COLUMNS = Columns(
    left=("provider", "kernel", "gradient"),
    right=(
        "time, ms",
        "p20 – p80",
        "floor, MB",
        "% of copy",
        "× eager",
        "extra memory, MB",
        "logp error",
        "gradient error",
    ),
    caption="time: median; floor: memory traffic that no kernel can do without; % of copy: the floor's traffic per "
    "second, of what copy_ of the same tensor reaches in this run; extra memory: peak on top of the logits, in a fresh "
    "process; errors against fp64: logp largest, nats; gradient relative L2",
    cells=cells,
    baselines=baselines,
    extra_bytes=extra_bytes,
    beyond="the logits",
    dispensable=("floor, MB", "p20 – p80", "% of copy", "gradient error", "logp error", "extra memory, MB"),
)
