"""The results of a run of the bench, as JSON. Tables and plots are made only from this."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Timing
from benchmarks.work import FUSED, Work
from unirl_kernels.commands.cli import CommandFailed

SCHEMA = 1

OK, WRONG, FAILED = "ok", "wrong", "failed"


@dataclass(frozen=True)
class Row:
    """A provider's results.

    Args:
        name, kernel: of the provider.
        overwrites: the gradient comes into the operand's memory.
        status: ``OK``; ``WRONG``, an error exceeds its budget; ``FAILED``, it raised.
        reasons: what is wrong or failed.
        time: seconds of one call; None unless it is right.
        peak_extra_bytes: memory of one call in a fresh process, on top of its operands; None where not measured.
        logp_error, entropy_error: largest absolute error against fp64, nats; None where it gives none.
        gradient_error: of the logits' gradient against fp64, relative L2.
        loss_error: against fp64, relative.
        d_hidden_error, d_weight_error: of gradients against fp64, relative L2.
    """

    name: str
    kernel: str
    overwrites: bool
    status: str
    reasons: Sequence[str] = ()
    time: Timing | None = None
    peak_extra_bytes: int | None = None
    logp_error: float | None = None
    entropy_error: float | None = None
    gradient_error: float | None = None
    loss_error: float | None = None
    d_hidden_error: float | None = None
    d_weight_error: float | None = None

    @property
    def key(self) -> str:
        """The name of the row among all rows of a run."""
        return key(self.name, self.kernel, self.overwrites)


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write what was measured as JSON."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps({"schema": SCHEMA, **content}, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)  # an interrupt leaves the old file


def key(name: str, kernel: str, overwrites: bool) -> str:
    """The name of a provider among all providers."""
    return f"{name} {kernel}{' in place' if overwrites else ''}"


@dataclass(frozen=True)
class Run:
    """All providers on one piece of work, and what bounds it: memory traffic and the time of copying the logits, or
    operations and the time of the bare matmuls.

    Args:
        work: the work.
        rounds: timed calls of each provider.
        elsewhere: share of the processors' time that other processes took while this was timed; None unknown.
        rows: the providers that took part.
        skipped: why others did not, by "provider kernel".
        floor_bytes: on logits, memory traffic that no kernel can do without.
        copy: seconds of ``copy_`` of the logits, which reads and writes ``work.logits_bytes`` each.
        sum: seconds of the sum of the logits.
        flops: on linear heads, what counts as done: the operations of the matmuls.
        matmuls: seconds of the bare matmuls.
        repeated, disturbed: see ``measure.Rounds``.
    """

    work: Work
    rounds: int
    elsewhere: float | None
    rows: Sequence[Row]
    skipped: Mapping[str, str]
    floor_bytes: int | None = None
    copy: Timing | None = None
    sum: Timing | None = None
    flops: int | None = None
    matmuls: Timing | None = None
    repeated: int | None = None
    disturbed: int | None = None

    @property
    def floor_seconds(self) -> float:
        """The time of the matmuls, or of the floor's traffic at the bandwidth of ``copy_``."""
        if self.matmuls is not None:
            return self.matmuls.median
        assert self.floor_bytes is not None
        return self.floor_bytes / self.copy_bandwidth

    @property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written."""
        assert self.copy is not None
        return 2 * self.work.logits_bytes / self.copy.median

    @property
    def eager(self) -> Row | None:
        """The reference of speed-ups: eager PyTorch with fp32 inside."""
        return next((row for row in self.rows if row.name == "eager" and row.status == OK), None)

    def speedup(self, row: Row) -> float | None:
        """How many times faster than eager PyTorch."""
        if row.time is None or self.eager is None or self.eager.time is None:
            return None
        return self.eager.time.median / row.time.median


@dataclass(frozen=True)
class Record:
    """A run of the bench: one piece of work or several.

    Args:
        date: ISO 8601, UTC.
        commit: of the checkout, or ``unknown``.
        dirty: whether the code in the checkout had uncommitted changes.
        versions: of Python, PyTorch, Triton, the package.
        hardware: what it ran on.
        runs: the results.
    """

    date: str
    commit: str
    dirty: bool
    versions: Mapping[str, str]
    hardware: Mapping[str, str | int]
    runs: Sequence[Run]

    def save(self, path: Path) -> None:
        save(asdict(self), path)

    @staticmethod
    def load(path: Path) -> Record:
        """Read a record.

        Raises:
            OSError: when the file cannot be read.
            ValueError: when it is not a record of this schema.
        """
        try:
            content = json.loads(path.read_text())
            if (schema := content.pop("schema")) != SCHEMA:
                raise ValueError(f"schema must be {SCHEMA}, got {schema}")
            return Record(**content | {"runs": [_run(run) for run in content["runs"]]})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name} is not a record of the bench: {error}") from error


def make_writable(out: Path | None) -> None:
    """Make the folder of a record.

    Raises:
        CommandFailed: when it cannot be written there.
    """
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            empty = file.tell() == 0
        if empty:  # the record is written with the first timings, not now
            out.unlink()
    except OSError as error:
        raise CommandFailed(f"cannot write to --out {out}: {error.strerror}") from error


def _run(content: dict[str, Any]) -> Run:
    rows = [Row(**row | {"reasons": tuple(row["reasons"]), "time": _timing(row["time"])}) for row in content["rows"]]
    times = {name: _timing(content.get(name)) for name in ("copy", "sum", "matmuls")}
    return Run(**content | times | {"work": Work(**content["work"]), "rows": rows})


def _timing(content: dict[str, float] | None) -> Timing | None:
    return None if content is None else Timing(**content)


def three_digits(x: float) -> str:
    """``x`` >= 0 with three significant digits and no exponent; 0 if it rounds to 0 at two decimals."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.01 else "0"


def title(work: Work) -> str:
    """The computation, as text."""
    what = work.modes[work.mode]
    what = f"{work.loss.rpartition(':')[2]}: {what}" if work.mode == FUSED else what
    chunks = "" if work.chunk_bytes is None else f", chunks of {three_digits(work.chunk_bytes / 1e6)} MB"
    return f"{what}; {size(work)}{', on policy' if work.on_policy else ''}{chunks}"


def size(work: Work) -> str:
    """Tokens, size of a hidden state, vocabulary and dtype."""
    return f"{' × '.join(str(n) for n in (work.tokens, work.hidden, work.vocab) if n is not None)} {work.dtype}"
