"""What ``make latest`` records; nothing is installed."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PRINTED = {
    "setup": "touch .venv/.built\n",
    "lint": "F401 [*] `os` imported but unused\n --> a.py:1:8\nWould reformat: b.py\nFound 1 error.\n",
    "types": "a/b.py:7: error: Incompatible types  [arg-type]\nFound 1 error in 1 file (checked 118 source files)\n",
    "tests": "FAILED tests/test_a.py::test_b[x] - assert 1 == 2\n1 failed, 20 passed, 3 skipped in 61.20s (0:01:01)\n",
    "wheel": "FAILED tests/test_a.py::test_c - assert 1 == 2\n1 failed, 9 passed in 9.10s\nx.whl: failed with torch\n",
}


@pytest.fixture
def latest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("latest", ROOT / ".ci" / "latest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COPY", tmp_path / "copy")
    monkeypatch.setattr(module, "RECORD", tmp_path / "docs" / "latest.md")
    monkeypatch.setattr(module, "copy_of_head", lambda: (tmp_path / "copy").mkdir() or "0123456789")
    monkeypatch.delenv("LATEST_KEEP", raising=False)
    monkeypatch.delenv("ARGS", raising=False)
    return module


def test_failures_are_recorded_by_name(latest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "make", lambda target: (target == "setup", PRINTED[target]))
    assert latest.main() == 1
    lines = latest.RECORD.read_text().splitlines()
    assert "| setup | passed |" in lines
    assert "| types | failed: Found 1 error in 1 file (checked 118 source files) |" in lines
    assert "| tests | failed: 1 failed, 20 passed, 3 skipped in 61.20s |" in lines
    named = lines[lines.index("```text") + 1 : -1]
    assert [line.split()[0] for line in named] == ["F401", "Would", "a/b.py:7:", "FAILED", "FAILED"]
    assert "commit 0123456789" in latest.RECORD.read_text()
    assert not latest.COPY.exists()


def test_tests_are_stopped_after_a_time(latest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest is interrupted, also where the command itself ignores interrupts, and says what failed until then."""
    latest.copy_of_head()
    (latest.COPY / "test_slow.py").write_text(
        "import time\ndef test_first(): assert 0, 'first'\ndef test_second(): time.sleep(600)\n"
    )
    python = f"{sys.executable} -m pytest -q -p no:cacheprovider"
    (latest.COPY / "Makefile").write_text(f"tests:\n\t{python}\nlint:\n\ttrue\n")
    monkeypatch.setenv("LATEST_SECONDS", "5")
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        succeeded, printed = latest.make("tests")
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert not succeeded
    assert latest.outcome("tests", succeeded, printed).startswith("stopped: 1 failed in")
    assert latest.failures(printed) == ["FAILED test_slow.py::test_first - AssertionError: first"]
    assert latest.make("lint")[0]


@pytest.mark.parametrize("printed", ["!!!! KeyboardInterrupt !!!!\n", "  File a.py, line 3\nKeyboardInterrupt\n"])
def test_an_interrupt_is_no_failure(latest: ModuleType, printed: str) -> None:
    assert latest.outcome("wheel", False, printed) == "stopped"
    assert latest.failures(printed) == []
    assert latest.outcome("wheel", False, "E   KeyboardInterrupt: by a test\n") == "failed"


def test_success_is_recorded_without_failures(latest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "make", lambda target: (True, "4 passed in 1.00s\n"))
    monkeypatch.setenv("ARGS", "tests/test_batch.py")
    assert latest.main() == 0
    text = latest.RECORD.read_text()
    assert "| tests | passed: 4 passed in 1.00s |" in text
    assert "Tests: `tests/test_batch.py`" in text
    assert "What failed" not in text


def test_checks_are_not_run_where_nothing_was_installed(latest: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "make", lambda target: (False, "ERROR: No matching distribution found for torch\n"))
    assert latest.main() == 1
    text = latest.RECORD.read_text()
    assert "| lint |" not in text
    assert "No matching distribution found for torch" in text
