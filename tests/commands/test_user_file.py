"""``FILE.py:NAME`` on the command line, and ``explain``, which takes one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import unirl_kernels as uk
from unirl_kernels.commands.cli import CommandFailed, main
from unirl_kernels.commands.user_file import load

OBJECTIVES = """
from __future__ import annotations

from dataclasses import dataclass

import torch
import unirl_kernels as uk
from unirl_kernels.objectives import DPO

RUNS = []


def gate(t):
    return -torch.sigmoid(t.logp - t.old_logp) * t.advantage


@dataclass(frozen=True)
class Scaled:
    factor: float = 3.0

    def __call__(self, t):
        return -self.factor * t.logp


@dataclass(frozen=True)
class Unfinished:
    factor: float

    def __call__(self, t):
        return -self.factor * t.logp


class Sequences:
    scope = "sequence"

    def __call__(self, t):
        return t.to_tokens(t.sequence_mean(t.logp))


class Planets(Sequences):
    scope = "planet"


scaled = Scaled(5.0)
preference = DPO(beta=0.3)
loss = uk.Loss(gate, uk.TokenMean(count=7))
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(OBJECTIVES)
    return file


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gate", ["GC = ", "sigmoid", "SequenceMean()"]),
        ("Scaled", ["logp * -3", "SequenceMean()"]),
        ("scaled", ["logp * -5", "SequenceMean()"]),
        ("Sequences", ["depends on its whole sequence"]),
        ("preference", ["DPO, equation (6), (7)", "PairMean()"]),
        ("loss", ["sigmoid", "TokenMean(count=7)"]),
    ],
)
def test_explain_takes_every_kind_of_objective(
    file: Path, name: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{file}:{name}"]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in says), shown


def test_explain_prints_what_the_function_returns(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{file}:gate"]) == 0
    objective = load(f"{file}:gate", "objective")
    assert callable(objective)
    assert capsys.readouterr().out == f"{uk.explain(uk.Loss(objective))}\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine.py:number", "objective must be callable, got 3 (int)"),
        ("mine.py:Unfinished", "missing 1 required positional argument: 'factor'"),
        ("mine.py:Planets", "scope must be one of token, sequence, pair, batch, got 'planet'"),
        (
            "mine.py:nobody",
            "the file has no 'nobody'; it has RUNS, gate, Scaled, Unfinished, ",
        ),
        ("nowhere.py:gate", "there is no file "),
        ("mine.py", "objective must be FILE.py:NAME, got "),
        ("mine.py:", "objective must be FILE.py:NAME, got "),
        ("mine.py:a.b", "objective must be FILE.py:NAME, got "),
        ("mine.txt:gate", "objective must be FILE.py:NAME, got "),
        ("crash.py:x", "running the file failed: ZeroDivisionError in line 2: division by zero"),
        ("syntax.py:x", "running the file failed: SyntaxError in line 1: "),
        ("leaves.py:x", "running the file failed: SystemExit in line 2: 5"),
        ("needs.py:x", "running the file failed: ModuleNotFoundError in line 1: No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_explained_gets_one_line(
    file: Path, name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "crash.py").write_text("x = 0\nx = 1 / x\n")
    (file.parent / "syntax.py").write_text("def (:\n")
    (file.parent / "leaves.py").write_text("import sys\nsys.exit(5)\n")
    (file.parent / "needs.py").write_text("import no_such_module\n")
    (file.parent / "mine.txt").write_text(OBJECTIVES)
    assert main(["explain", str(file.parent / name)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("unirl_kernels explain: objective ")
    assert says in said


def test_a_file_runs_once_and_is_found_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(f"{file}:RUNS", "x")
    monkeypatch.chdir(file.parent)
    assert load("mine.py:RUNS", "x") is first


def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Nor does a file take the place of an installed module."""
    for i, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "torch.py").write_text(f"value = {i}\n")
    torch = sys.modules["torch"]
    assert [load(f"{tmp_path / folder / 'torch.py'}:value", "x") for folder in ("a", "b")] == [0, 1]
    assert sys.modules["torch"] is torch


def test_a_file_that_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(CommandFailed, match="ZeroDivisionError"):
        load(f"{tmp_path / 'broken.py'}:x", "x")
    assert set(sys.modules) == before
