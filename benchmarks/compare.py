"""Compares two saved records of the bench: what became slower or faster beyond the noise, larger, or wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import OK, Record, Row, Run, title
from unirl_kernels.commands.cli import CommandFailed

SLOWER, FASTER, SAME = "slower", "faster", "same"
WRONG_NOW, RIGHT_NOW, LARGER, GONE = "wrong now", "right now", "more memory", "gone"
REGRESSIONS = (SLOWER, WRONG_NOW, LARGER, GONE)
PAGES = 1 << 20
"""Bytes by which the resident memory of a process may differ between two runs of the same call."""


@dataclass(frozen=True)
class Verdict:
    """A provider's results in two records.

    Args:
        work: what was computed.
        key: the provider.
        old, new: median milliseconds; None where it was not timed.
        ratio: new by old; None where one of them is missing.
        verdict: one of the module's words.
    """

    work: str
    key: str
    old: float | None
    new: float | None
    ratio: float | None
    verdict: str


def compare(old: Record, new: Record) -> list[Verdict]:
    """One verdict for each provider of each piece of work that both records have.

    A provider is slower if the middle 60 % of its times are all above those of the old record, and faster if they are
    all below. Memory has grown if the peak has grown by more than 5 % and a megabyte.

    Raises:
        ValueError: when the records have no work in common.
    """
    runs = {json.dumps(asdict(run.work), sort_keys=True): run for run in new.runs}
    pairs = [(run, runs.get(json.dumps(asdict(run.work), sort_keys=True))) for run in old.runs]
    found = [verdict for run, other in pairs if other is not None for verdict in _of_run(run, other)]
    if not any(other for _, other in pairs):
        raise ValueError("the two records have no work in common")
    return found


def _of_run(old: Run, new: Run) -> Iterator[Verdict]:
    rows = {row.key: row for row in new.rows}
    for row in old.rows:
        other = rows.get(row.key)
        before, after = (None if x is None or x.time is None else 1e3 * x.time.median for x in (row, other))
        ratio = after / before if before and after else None
        yield Verdict(title(old.work), row.key, before, after, ratio, _verdict(row, other))


def _verdict(old: Row, new: Row | None) -> str:
    if new is None:
        return GONE
    if (old.status == OK) != (new.status == OK):
        return WRONG_NOW if old.status == OK else RIGHT_NOW
    if old.time and new.time:
        if new.time.p20 > old.time.p80:
            return SLOWER
        if new.time.p80 < old.time.p20:
            return FASTER
    before, after = old.peak_extra_bytes, new.peak_extra_bytes
    if before is not None and after is not None and after > 1.05 * before + PAGES:
        return LARGER
    return SAME


def run_compare(old: Path, new: Path) -> int:
    """Print the verdicts.

    Returns:
        The exit code: 0 without a regression.

    Raises:
        CommandFailed: when a file cannot be read or is no record, or the records have no work in common.
    """
    records = []
    for path in (old, new):
        try:
            records.append(Record.load(path))
        except (OSError, ValueError) as error:
            raise CommandFailed(f"cannot read {path}: {error}") from error
    try:
        found = compare(*records)
    except ValueError as error:
        raise CommandFailed(str(error)) from error
    for name in ("hardware", "versions"):
        before, after = (dict(getattr(record, name)) for record in records)
        if before != after:
            changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
            sys.stdout.write(f"another {name}: {', '.join(changed)}\n")
    sys.stdout.write("\n".join(lines(found)) + "\n")
    return int(any(verdict.verdict in REGRESSIONS for verdict in found))


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A table of at most 80 columns for each piece of work, and a summary."""
    found: list[str] = []
    work = None
    for verdict in verdicts:
        if verdict.work != work:
            work = verdict.work
            found += [work, f"  {'provider':40} {'old ms':>8} {'new ms':>8} {'ratio':>6}  verdict"]
        times = [f"{x:8.4g}" if x is not None else " " * 8 for x in (verdict.old, verdict.new)]
        ratio = f"{verdict.ratio:6.2f}" if verdict.ratio is not None else " " * 6
        found.append(f"  {verdict.key[:40]:40} {times[0]} {times[1]} {ratio}  {verdict.verdict}")
    bad = [verdict for verdict in verdicts if verdict.verdict in REGRESSIONS]
    return [*found, f"{len(bad)} regressions among {len(verdicts)}"]
