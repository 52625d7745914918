"""What ``make test-trainers`` counts as a failure. A trainer's tests run here, without an environment of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.integrations import environments

PASSES = "def test_passes(): pass\n"
SKIPS = "import pytest\ndef test_skips(): pytest.skip('no such function')\n"
FAILS = "def test_fails(): assert False\n"


@pytest.fixture(name="folder")
def _folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder below the checkout, so that the checkout's options of pytest hold."""
    build = environments.ROOT / "build"
    build.mkdir(exist_ok=True)
    monkeypatch.setattr(environments, "make", lambda name: Path(sys.executable))
    with TemporaryDirectory(dir=build) as folder:
        monkeypatch.setattr(environments, "tests", lambda name: [folder])
        yield Path(folder)


@pytest.mark.parametrize(
    ("trainer", "code", "said"),
    [
        ("verl", PASSES, None),
        ("verl", PASSES + SKIPS, "verl: tests were skipped"),
        ("trl==1.10.0", PASSES + SKIPS, None),
        ("verl", PASSES + FAILS, "verl: tests fail with exit code 1"),
        ("trl==1.10.0", PASSES + FAILS, "trl==1.10.0: tests fail with exit code 1"),
        ("trl==1.10.0", SKIPS, "trl==1.10.0: no test passed"),
    ],
)
def test_outcomes(folder: Path, trainer: str, code: str, said: str | None) -> None:
    (folder / "test_of_trainer.py").write_text(code)
    assert environments.test(trainer) == said


def test_unknown_trainers_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"trainers must be among .*verl, trl==RELEASE, got trl==new"):
        environments.main(["trl==new"])
