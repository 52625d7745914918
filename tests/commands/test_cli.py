"""The command line: errors are one clear line and a non-zero exit code, never a traceback."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from unirl_kernels import backends
from unirl_kernels.commands import cli, doctor


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
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "required: COMMAND"),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], says: str) -> None:
    code, line = _answer(capsys, *arguments)
    assert code == cli.WRONG_USAGE
    assert says in line
    assert line.startswith(f"unirl_kernels {arguments[0]}: " if len(arguments) > 1 else "unirl_kernels: ")
    assert line.endswith("--help)")


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    heavy = "{'rich', 'transformers', 'matplotlib', 'reasoning_gym', 'triton'} & set(sys.modules)"
    script = f"import sys, unirl_kernels.commands.cli as c\ntry: c.main(['--help'])\nfinally: print('loaded', {heavy})"
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
        monkeypatch.setattr(doctor, "_print_rich", doctor._print_plain)
    monkeypatch.setattr(
        backends, "unavailable", lambda name, device: "it is out of tea [1]" if name == "triton" else None
    )
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "numpy", "cpu", "eager", "composed", "it is out of tea [1]"):
        assert word in shown


def test_doctor_speaks_json_and_of_trainers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = {"trl": "1.99.0", "verl": "0.9.3", "torch": "9.9"}

    def version(package: str) -> str:
        if package not in releases:
            raise importlib.metadata.PackageNotFoundError(package)
        return releases[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"package": "torch", "version": "9.9"} in found["Versions"]
    tried = {row["package"]: row["tried"] for row in found["Trainers"]}
    others = dict.fromkeys(("openrlhf", "llamafactory", "ms-swift", "unsloth", "axolotl"), "-")
    assert tried == {"trl": "no", "verl": "yes", **others}


def test_doctor_exits_with_an_error_when_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_defaults", lambda device: [(str(device), "none")])
    monkeypatch.setattr(backends, "unavailable", lambda name, device: "no")
    assert cli.main(["doctor"]) == doctor.NO_BACKEND


def test_doctor_explains_a_missing_extension(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> dict[str, str]:
        raise ImportError("the native extension is not built")

    monkeypatch.setattr("unirl_kernels.backends.cpu.report", missing)
    assert doctor._native() == [("usable", "no: the native extension is not built")]
