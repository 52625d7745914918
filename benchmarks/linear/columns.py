"""The table of work on linear heads."""

from __future__ import annotations

from benchmarks.columns import BLANK, Columns, error, faster, megabytes, timed, timing
from benchmarks.linear.floor import gradient_bytes
from benchmarks.measure import Timing
from benchmarks.record import Row, Run, three_digits


def cells(run: Run, row: Row) -> list[str]:
    return [
        row.name,
        row.kernel,
        *timed(row),
        *([BLANK] * 2 if row.time is None else _against_matmuls(run, row.time)),
        faster(run, row),
        megabytes(extra_bytes(run, row)),
        *(error(x) for x in (row.loss_error, row.logp_error, row.d_hidden_error, row.d_weight_error)),
    ]


def baselines(run: Run) -> list[list[str]]:
    """The bare matmuls."""
    assert run.matmuls is not None
    name = "mm, three times" if run.work.has_gradient else "mm"
    return [["torch", name, *timing(run.matmuls), *_against_matmuls(run, run.matmuls), *[BLANK] * 6]]


def _against_matmuls(run: Run, time: Timing) -> list[str]:
    assert run.flops is not None
    return [f"{time.median / run.floor_seconds:.2f}", three_digits(run.flops / time.median / 1e9)]


def extra_bytes(run: Run, row: Row) -> int | None:
    return None if row.peak_extra_bytes is None else max(0, row.peak_extra_bytes - gradient_bytes(run.work))


COLUMNS = Columns(
    left=("provider", "kernel"),
    right=(
        "time, ms",
        "p20 – p80",
        "× matmuls",
        "Gflop/s",
        "× eager",
        "extra memory, MB",
        "loss error",
        "logp error",
        "d_hidden error",
        "d_weight error",
    ),
    caption="time: median; × matmuls: of the time of the bare matmuls of these shapes in this run; Gflop/s: "
    "of these matmuls' operations, whatever a provider computes beyond them; extra memory: peak on top of inputs and "
    "gradients, in a fresh process; errors against fp64: logp largest, nats; the others relative, of gradients L2",
    cells=cells,
    baselines=baselines,
    extra_bytes=extra_bytes,
    beyond="inputs and gradients",
    dispensable=(
        "p20 – p80",
        "Gflop/s",
        "d_weight error",
        "logp error",
        "loss error",
        "d_hidden error",
        "extra memory, MB",
    ),
)
