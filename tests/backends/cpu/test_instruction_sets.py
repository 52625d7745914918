"""Every compiled instruction set: what is asked of the one that the machine would choose is asked of the others, too.

``test_accuracy``, ``test_kept`` and ``test_rows`` run in the tests' own process, and here again in fresh ones with each
of the other instruction sets forced.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unirl_kernels.backends import cpu

native = cpu._native()
HERE = Path(__file__)
ASKED = [*map(HERE.with_name, ("test_accuracy.py", "test_kept.py", "test_rows.py")), HERE]


def test_runs_on_the_instruction_set_that_was_asked_for() -> None:
    forced = os.environ.get("UNIRL_CPU_ISA")
    report = cpu.report()
    assert report["instruction set"] == (forced or native.instruction_set())
    assert report["compiled"].split(", ")[-1] == "baseline"


def in_a_fresh_process(instruction_set: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "pytest", "-x", "--noconftest", "-k", "not fresh_process", *ASKED]
    environment = os.environ | {"UNIRL_CPU_ISA": instruction_set}
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("name", native.compiled_instruction_sets())
def test_fresh_process_of_each_instruction_set(name: str) -> None:
    if name == native.instruction_set():
        pytest.skip("is the one that the tests' own process runs on")
    result = in_a_fresh_process(name)
    if f"UNIRL_CPU_ISA is {name}, which this machine does not support" in result.stdout:
        pytest.skip(f"this machine has no {name}, and the backend says so")
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    code = "import torch; from unirl_kernels.backends import cpu; print(cpu.unavailable(torch.device('cpu')))"
    environment = os.environ | {"UNIRL_CPU_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    names = ", ".join(native.compiled_instruction_sets())
    assert result.stdout.strip() == f"UNIRL_CPU_ISA must be one of {names}, got sse9"
