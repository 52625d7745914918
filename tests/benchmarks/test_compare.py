"""Saved records compared, as CSV and Markdown, kept when interrupted, and shown on a narrow terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.compare import FASTER, GONE, LARGER, RIGHT_NOW, SAME, SLOWER, WRONG_NOW, compare, lines
from benchmarks.export import as_csv, as_markdown
from benchmarks.measure import Sample, Timing
from benchmarks.measurement import Measurement
from benchmarks.record import OK, WRONG, Record, Row, Run, three_digits
from benchmarks.table import terminal
from benchmarks.work import Work

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-epyc-zen5-2core"
SMALL = [
    "--tokens",
    "8",
    "--vocab",
    "50",
    "--dtype",
    "fp32",
    "--device",
    "cpu",
    "--kernels",
    "cpu/rows",
    "--rounds",
    "2",
]


def row(kernel: str, median: float | None = 1.0, noise: float = 0.1, status: str = OK, peak: int | None = None) -> Row:
    time = None if median is None else Timing(median, median - noise, median + noise)
    return Row("unirl_kernels", kernel, False, status, ["broken"] if status != OK else [], time, peak)


def record(*rows: Row, tokens: int = 8) -> Record:
    work = Work(tokens=tokens, vocab=10, dtype="fp32")
    run = Run(work, 3, None, rows, {}, floor_bytes=1, copy=Timing(1, 1, 1), sum=Timing(1, 1, 1))
    return Record("2026-01-01", "abc", False, {}, {}, [run])


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row("a"), row("a", 1.15), SAME),
        (row("a"), row("a", 1.25), SLOWER),
        (row("a", noise=0.3), row("a", 1.25), SAME),
        (row("a"), row("a", 0.75), FASTER),
        (row("a"), row("a", None, status=WRONG), WRONG_NOW),
        (row("a", None, status=WRONG), row("a"), RIGHT_NOW),
        (row("a", peak=10**8), row("a", peak=104 * 10**6), SAME),
        (row("a", peak=10**8), row("a", peak=108 * 10**6), LARGER),
        (row("a"), row("b"), GONE),
    ],
)
def test_verdicts(old: Row, new: Row, verdict: str) -> None:
    (found,) = compare(record(old), record(new))
    assert found.verdict == verdict
    assert all(len(line) <= 80 for line in lines([found]))


def test_the_command_tells_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {}
    for name, rows in {"old": [row("a")], "new": [row("a", 2.0)]}.items():
        files[name] = tmp_path / f"{name}.json"
        record(*rows).save(files[name])
    assert main(["compare", str(files["old"]), str(files["old"])]) == 0
    assert main(["compare", str(files["old"]), str(files["new"])]) == 1
    out = capsys.readouterr().out
    assert "2.00  slower" in out
    assert "1 regressions among 1" in out
    record(row("a"), tokens=16).save(files["new"])
    assert main(["compare", str(files["old"]), str(files["new"])]) != 0
    assert "no work in common" in capsys.readouterr().err


def test_csv_and_markdown_have_every_result() -> None:
    saved = Record.load(RESULTS / "grpo-512x151936-fp32.json")
    (run,) = saved.runs
    found = list(csv.DictReader(io.StringIO(as_csv([saved]))))
    assert [(x["name"], x["kernel"]) for x in found] == [(x.name, x.kernel) for x in run.rows]
    assert float(found[0]["median"]) == run.rows[0].time.median  # type: ignore[union-attr]
    text = as_markdown([saved])
    assert all(x.kernel in text for x in run.rows)


def test_the_table_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(RESULTS / "grpo-512x151936-fp32.json"), "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("date,commit,loss,mode,tokens")


@pytest.mark.parametrize("name", ["grpo-512x151936-fp32", "linear-grpo-2048x576x49152-fp32"])
def test_eighty_columns_show_whole_words(name: str) -> None:
    (run,) = Record.load(RESULTS / f"{name}.json").runs
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal(run, 80))
    text = console.export_text()
    assert "…" not in text
    assert all(line.rstrip()[-1] == line[0] for line in text.splitlines() if line[0] in "│┃")  # nothing is cut off
    words = " ".join(text.split())
    assert "No room for: " in words
    assert "extra memory: peak" in words
    assert "p20 – p80" in words.split("No room for: ")[1]
    assert "% of copy:" not in words  # what is not shown is not explained
    assert "Gflop/s:" not in words
    for shown in run.rows:
        if shown.time is not None:
            assert three_digits(shown.time.median * 1e3) in text
        assert shown.name in text


@pytest.mark.parametrize("stage", ["time", "memory"])
def test_what_was_timed_is_kept(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "out.json"

    def interrupted(*args: Any) -> Run:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, stage, interrupted)
    assert main([*SMALL, "--peers", "none", "--out", str(out)]) != 0
    if stage == "time":
        assert not out.exists()  # and no empty file
    else:
        (run,) = Record.load(out).runs
        assert [x.peak_extra_bytes for x in run.rows] == [None, None]
        assert all(x.time is not None for x in run.rows)


def test_complete_rounds_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the fourth timed round of two kernels and two baselines."""
    out = tmp_path / "out.json"
    calls = 0

    def interrupted(call: Callable[[], object], device: torch.device) -> Sample:
        nonlocal calls
        calls += 1
        if calls == 4 * (1 + 3) + 2:
            raise KeyboardInterrupt
        call()
        return Sample(1e-3 * calls, waited=0.0)

    monkeypatch.setattr("benchmarks.measure._wall_seconds", interrupted)
    assert main([*SMALL, "--peers", "none", "--no-memory", "--rounds", "7", "--out", str(out)]) != 0
    (run,) = Record.load(out).runs
    assert (run.rounds, len(run.rows)) == (3, 2)
    assert all(row.time is not None and 5e-3 <= row.time.median <= 16e-3 for row in run.rows)
