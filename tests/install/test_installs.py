"""What ``make installs`` records; nothing is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("installs", ROOT / ".ci" / "installs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(module, "README", readme)
    monkeypatch.delenv("TORCH", raising=False)
    return module


def rows(module: ModuleType) -> list[list[str]]:
    lines = module.TABLE.findall(module.README.read_text())[0].removeprefix(module.HEAD).splitlines()
    return [line.strip("| ").split(" | ") for line in lines]


def test_lines_are_those_of_readme(installs: ModuleType) -> None:
    assert installs.block("Install", "sh").splitlines()[1:] == ['pip install ".[triton]"']
    assert "uk.fused_loss" in installs.block("Quick start", "python")
    assert installs.OLDEST_AND_NEWEST.split()[0] in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_rows_are_kept_replaced_and_ordered(installs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before, text = rows(installs), installs.README.read_text()
    releases = {"python3.9": "3.9.18", "python3.10": "3.10.99"}
    outcome, nvcc = "works", None
    monkeypatch.setattr(installs, "attempt", lambda p, t, _: ([releases[p], "2.15.0", "none", "84.2.1"], outcome))
    monkeypatch.setattr(installs.shutil, "which", lambda _: nvcc)

    def ours() -> list[list[str]]:
        return [row for row in rows(installs) if row[0].strip("`") in releases.values()]

    assert installs.main(["python3.10"]) == 0
    assert installs.main(["python3.9"]) == 0
    assert [row[0] for row in ours()] == ["`3.9.18`"] * 2 + ["`3.10.99`"] * 2
    outcome = "install failed"
    assert installs.main(["python3.9"]) == 1
    assert [row[6] for row in ours()] == ["install failed"] * 2 + ["works"] * 2
    assert [row[1] for row in ours()] == ["`torch==2.11.*`", "`torch`"] * 2
    nvcc = "/bin/nvcc"
    assert installs.main(["python3.9"]) == 1
    assert [row[5] for row in ours()] == ["no", "yes"] * 2 + ["no"] * 2
    assert [row for row in rows(installs) if row not in ours()] == before
    assert installs.TABLE.sub("", installs.README.read_text()) == installs.TABLE.sub("", text)


def test_a_python_must_be_named(installs: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"PYTHON\.\.\."):
        installs.main([])
