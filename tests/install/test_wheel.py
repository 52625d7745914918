"""What ``make wheel`` says; nothing is compiled or installed."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel", ROOT / ".ci" / "wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("ARGS", raising=False)
    return module


def test_each_torch_that_fails_is_named(
    wheel: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests run beside the checkout's other files, without its package, in an environment that is removed."""
    installed: list[tuple[str, ...]] = []

    def environment(folder: Path, *packages: str) -> Path:
        folder.mkdir()
        installed.append(packages)
        return folder / "python"

    def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
        if "wheel" in command:
            made = Path(str(command[command.index("-w") + 1]))
            made.mkdir()
            (made / "made.whl").touch()
            return subprocess.CompletedProcess([], 0)
        folder = Path(str(options["cwd"]))
        assert (folder / "tests" / "conftest.py").exists()
        assert not (folder / "unirl_kernels").exists()
        assert {"tests/operators", "not slow"} <= set(map(str, command))
        return subprocess.CompletedProcess([], int(installed[-1][0] == "torch==1"))

    monkeypatch.setattr(wheel, "environment", environment)
    monkeypatch.setattr(wheel.subprocess, "run", run)
    assert wheel.main(["torch==1", "torch==2"]) == 1
    assert capsys.readouterr().out == "made.whl: failed with torch==1\n"
    builds, *runs = installed
    assert builds == (), "the wheel is built without torch"
    assert [packages[0] for packages in runs] == ["torch==1", "torch==2"]
    assert all(packages[1].endswith("made.whl") for packages in runs)
    assert wheel.main(["torch==2"]) == 0


def test_the_oldest_torch_is_the_oldest_that_is_supported(wheel: ModuleType) -> None:
    oldest = wheel.OLDEST_AND_NEWEST[0].removeprefix("torch==").removesuffix(".*")
    assert f'dependencies = ["torch>={oldest}"]' in (ROOT / "pyproject.toml").read_text()
