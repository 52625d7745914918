"""The README's tables of results, between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``.

NAME is a saved record, its path below the folder of results without ``.json``.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from benchmarks.record import Record, title
from benchmarks.table import QUIET, WIDTH, markdown
from unirl_kernels.commands.cli import CommandFailed

MARKED = re.compile(r"(?P<open><!-- bench:(?P<name>\S+) -->\n).*?(?P<close><!-- /bench -->)", re.DOTALL)


def renew(document: Path, results: Path) -> int:
    """Rewrite the tables of ``document``.

    Raises:
        CommandFailed: when a file cannot be read or written, or a record is missing.
    """
    try:
        text = document.read_text()
        document.write_text(renewed(text, results))
    except OSError as error:
        raise CommandFailed(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise CommandFailed(str(error)) from error
    return 0


def renewed(text: str, results: Path) -> str:
    """``text`` with tables made from the records in ``results``.

    Raises:
        OSError: when a record is missing.
        ValueError: when a file is not a record, or a marker is not closed.
    """
    opened, marked = text.count("<!-- bench:"), len(MARKED.findall(text))
    if opened != marked:
        raise ValueError(f"each <!-- bench:NAME --> needs its <!-- /bench -->: {opened} opened, {marked} closed")

    def fill(found: re.Match[str]) -> str:
        name = found["name"]
        return f"{found['open']}{section(results / f'{name}.json')}{found['close']}"

    return MARKED.sub(fill, text)


def section(file: Path) -> str:
    """The tables of a record, each under its title, and the machine on which they were measured."""
    record = Record.load(file)
    tables = [f"**{title(run.work)}**\n\n{markdown(run)}\n" for run in record.runs]
    machine = record.hardware.get("gpu") or f"{record.hardware['cpu']}, {record.hardware['threads']} threads"
    changed = " with uncommitted changes" if record.dirty else ""
    made = f"{machine}; torch {record.versions['torch']}; {record.date[:10]}, commit {record.commit[:10]}{changed}"
    busiest = max(run.elsewhere or 0 for run in record.runs)
    others = f"; other processes took up to {100 * busiest:.0f} % of the processors' time" if busiest > QUIET else ""
    made = textwrap.fill(f"{made}. Medians of {record.runs[0].rounds} interleaved rounds{others}.", WIDTH)
    return "\n".join([*tables, f"{made}\n"])
