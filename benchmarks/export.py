"""Saved records as CSV or Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.record import Record, title
from benchmarks.table import markdown
from unirl_kernels.commands.cli import CommandFailed

MARKDOWN, CSV = "markdown", "csv"


def exported(files: Sequence[Path], form: str) -> str:
    """The tables of saved records.

    Args:
        files: the records.
        form: ``MARKDOWN`` or ``CSV``.

    Raises:
        CommandFailed: when a file cannot be read or is no record.
    """
    records = []
    for path in files:
        try:
            records.append(Record.load(path))
        except (OSError, ValueError) as error:
            raise CommandFailed(f"cannot read {path}: {error}") from error
    return as_csv(records) if form == CSV else as_markdown(records)


def as_markdown(records: Sequence[Record]) -> str:
    """A table for each piece of work, below its title."""
    return "\n\n".join(f"**{title(run.work)}**\n\n{markdown(run)}" for record in records for run in record.runs) + "\n"


def as_csv(records: Sequence[Record]) -> str:
    """A line for each provider of each piece of work: the work, then the results, times in seconds."""
    found: list[dict[str, object]] = []
    for record in records:
        for run in record.runs:
            for row in run.rows:
                results = asdict(row)
                results["reasons"] = "; ".join(row.reasons)
                time = results.pop("time") or {}
                work = asdict(run.work)
                found.append({"date": record.date, "commit": record.commit, **work, **results, **time})
    names = list(dict.fromkeys(name for line in found for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
