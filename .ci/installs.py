"""Follow README's install lines in an empty directory, per Python and torch; the outcomes are a table in README.

    python .ci/installs.py PYTHON...      such as python3.10 python3.13

TORCH holds the releases, by default the oldest that is supported and the newest: "torch==2.11.* torch". Rows of other
Pythons and releases stay as they are, and rows with nvcc on PATH beside those without. A torch for Linux on x86-64
takes six gigabytes while its row is made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OLDEST_AND_NEWEST = "torch==2.11.* torch"
TABLE = re.compile(r"(?<=<!-- installs -->\n).*?(?=<!-- /installs -->)", flags=re.DOTALL)
HEAD = """| Python | torch asked for | torch | Triton | setuptools | nvcc on PATH | outcome | date, commit |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
CHECK = """
import torch, unirl_kernels as uk
logits, target = torch.randn(4, 1000), torch.randint(0, 1000, (4,))
logp = uk.token_stats(logits, target, plan=uk.Plan(backend="cpu")).logp
torch.testing.assert_close(logp, logits.log_softmax(-1).gather(-1, target[:, None])[:, 0])
"""
VERSIONS = """
import platform, torch
from importlib.metadata import distributions
found = {d.metadata["Name"]: d.version for d in distributions()}
print(platform.python_version(), torch.__version__, *(found.get(name, "none") for name in ("triton", "setuptools")))
"""


def block(section: str, language: str) -> str:
    """The first fenced block of a section of README, or all of them where it is Python."""
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(found) if language == "python" else found[0]


def attempt(python: str, torch: str, folder: Path) -> tuple[list[str], str]:
    """Versions that were installed, and what came of it."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    environment = os.environ | {"PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    lines, asked = block("Install", "sh"), f'pip install "{torch}"'
    assert lines.startswith("pip install torch ")
    steps = [
        ("install", "clone", ["bash", "-e", "-c", lines.replace("pip install torch", asked, 1)]),
        ("native kernels", ".", ["python", "-c", CHECK]),
        ("quick start", ".", ["python", "-c", block("Quick start", "python")]),
    ]
    outcome = "works"
    for name, where, command in steps:
        result = subprocess.run(command, cwd=folder / where, env=environment, capture_output=True, text=True)
        if result.returncode != 0:
            sys.stderr.write(result.stdout + result.stderr)
            outcome = f"{name} failed"
            break
    found = subprocess.run(["python", "-c", VERSIONS], cwd=folder, env=environment, capture_output=True, text=True)
    return found.stdout.split() or ["?"] * 4, outcome


def key(line: str) -> tuple[str, ...]:
    """What a row is a row of: Python, the torch that is asked for, whether there is nvcc."""
    cells = line.split(" | ")
    return cells[0], cells[1], cells[5]


def write(rows: str) -> None:
    README.write_text(TABLE.sub(lambda _: HEAD + rows, README.read_text()))


def main(pythons: list[str]) -> int:
    if not pythons:
        raise SystemExit(f"usage: {sys.argv[0]} PYTHON...")
    commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    rows = {key(line): line for line in TABLE.findall(README.read_text())[0].splitlines() if line.startswith("| `")}
    failed = 0
    for python in pythons:
        for torch in os.environ.get("TORCH", OLDEST_AND_NEWEST).split():
            with tempfile.TemporaryDirectory() as folder:
                (release, *versions), outcome = attempt(python, torch, Path(folder))
            failed += outcome != "works"
            when = f"{datetime.now(timezone.utc):%Y-%m-%d}, {commit.strip()}"
            nvcc = "yes" if shutil.which("nvcc") else "no"
            cells = [f"`{release}`", f"`{torch}`", *versions, nvcc, outcome, when]
            line = f"| {' | '.join(cells)} |"
            sys.stdout.write(line + "\n")
            rows[key(line)] = line
            order = sorted(rows, key=lambda row: ([int(n) for n in re.findall(r"\d+", row[0])], row[1:]))
            write("".join(rows[row] + "\n" for row in order))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
