"""Install the newest releases in a copy of HEAD, run the checks there, record their outcome in docs/latest.md.

Environment: TORCH and TRITON, requirements that pip installs (default: the newest); ARGS, arguments of pytest;
LATEST_SECONDS, after which the tests are stopped, and what they said until then is recorded. The wheel is that of
``make wheel``, with the oldest torch and the newest.
The copy and its environment are removed at the end; LATEST_KEEP=1 leaves them in .latest.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / ".latest"
RECORD = ROOT / "docs" / "latest.md"
CHECKS = ("setup", "lint", "types", "tests", "wheel")
NEWEST = {"LOCK": "", "TORCH": os.environ.get("TORCH", "torch"), "TRITON": os.environ.get("TRITON", "triton")}
NAMED = (
    *("torch", "triton", "numpy", "transformers", "trl", "accelerate", "peft", "verl", "tensordict", "rich"),
    *("matplotlib", "gguf", "setuptools", "pytest", "hypothesis", "ruff", "mypy"),
)


def copy_of_head() -> str:
    """Check HEAD out into COPY; returns the commit's abbreviated name."""
    shutil.rmtree(COPY, ignore_errors=True)
    COPY.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=COPY, check=True, input=archive.stdout)
    return subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def make(target: str) -> tuple[bool, str]:
    """Run a target in the copy; returns whether it succeeded, and what it printed."""
    given = [f"{name}={value}" for name, value in NEWEST.items()]
    lines: list[str] = []
    group = subprocess.Popen(
        ["make", target, *given],
        cwd=COPY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a command in the background ignores it
    )
    seconds = os.environ.get("LATEST_SECONDS") if target in ("tests", "wheel") else None
    # An interrupted pytest still says what has failed.
    timer = threading.Timer(float(seconds or threading.TIMEOUT_MAX), os.killpg, (group.pid, signal.SIGINT))
    timer.daemon = True
    timer.start()
    with group as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    timer.cancel()
    return process.returncode == 0, "".join(lines)


def releases() -> dict[str, str]:
    """Releases of the packages that the record names, as installed in the copy's environment."""
    code = (
        "import importlib.metadata as m\n"
        f"for name in {NAMED!r}:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    python = COPY / ".venv" / "bin" / "python"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in found.splitlines())


STOPPED = re.compile(r"KeyboardInterrupt !!!|^KeyboardInterrupt$", flags=re.MULTILINE)
"""In the last lines of an interrupted pytest, and of any other Python program."""


def outcome(target: str, succeeded: bool, printed: str) -> str:
    """One cell of the table: the last line that counts tests or errors, else passed or failed."""
    counts = re.findall(r"^(?:=+ )?((?:\d+ \w+,? ?)+in [\d.]+s|Found \d+ .*|Success: .*)", printed, flags=re.MULTILINE)
    said = "stopped" if STOPPED.search(printed) else "passed" if succeeded else "failed"
    return said + (f": {counts[-1].strip()}" if counts else "")


FAILED = re.compile(r"^(?:(?:FAILED|ERROR) |Would reformat: |[A-Z]{1,4}\d{3} |\S+:\d+: error: ).*", flags=re.MULTILINE)
"""Lines of pytest, of ruff and of mypy."""


def failures(printed: str) -> list[str]:
    """What failed, by name; what a check printed last where none is named and nothing stopped it."""
    found = [line.replace(str(COPY), ".")[:400] for line in dict.fromkeys(FAILED.findall(printed))]
    return found if found or STOPPED.search(printed) else printed.splitlines()[-5:]


def main() -> int:
    commit = copy_of_head()
    rows, failed = [], []
    for target in CHECKS:
        succeeded, printed = make(target)
        rows.append((target, outcome(target, succeeded, printed)))
        if not succeeded:
            failed += failures(printed)
        if target == "setup" and not succeeded:
            break
    python = COPY / ".venv" / "bin" / "python"
    installed = releases() if python.exists() else {}
    lines = [
        "# The newest of everything",
        "",
        "`make latest` writes this file. It installs the newest releases instead of those in",
        "`constraints.txt`, in a copy of the commit, and runs every check there.",
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, commit {commit}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}."
        + (f" Tests: `{os.environ['ARGS']}`." if os.environ.get("ARGS") else ""),
        "",
        "| check | outcome |",
        "| --- | --- |",
        *(f"| {target} | {said} |" for target, said in rows),
        "",
        "| package | release |",
        "| --- | --- |",
        *(f"| {name} | {release} |" for name, release in installed.items()),
    ]
    if failed:
        lines += ["", "What failed:", "", "```text", *failed, "```"]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text("\n".join(lines) + "\n")
    if not os.environ.get("LATEST_KEEP"):
        shutil.rmtree(COPY)
    return int(any(not said.startswith("passed") for _, said in rows))


if __name__ == "__main__":
    sys.exit(main())
