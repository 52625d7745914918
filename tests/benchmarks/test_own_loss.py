"""``--loss FILE.py:OBJECTIVE``: a user's objective is the loss, and its own truth in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.record import OK, Record

FILE = """
import torch

def gate(t):
    ratio = torch.exp(t.logp - t.old_logp)
    return -torch.sigmoid(ratio - 1) * t.advantage

class Pairs:
    scope = "pair"

    def __call__(self, t):
        chosen, rejected = t.pairs(t.sequence_sum(t.logp - t.ref_logp))
        return -torch.nn.functional.logsigmoid(chosen - rejected)

def bonus(t):
    return -t.entropy

def detached(t):
    return -t.logp * t.entropy.detach()

def missing(t):
    return -t.logp * t.keep
"""
WRONG = """
import unirl_kernels as uk

def mine(logits, batch):
    return 1.001 * uk.fused_loss(logits, batch, uk.Loss(gate, uk.SequenceMean())).loss
"""
SMALL = ["--tokens", "16", "--vocab", "50", "--dtype", "fp32", "--device", "cpu", "--rounds", "2", "--no-memory"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "losses.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("head", [[], ["--hidden", "8"]], ids=["logits", "linear"])
@pytest.mark.parametrize("name", ["gate", "Pairs"])
def test_is_measured_and_held_against_fp64(name: str, head: list[str], file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    given = [*SMALL, *head, "--kernels", "cpu", "--peers", "eager", "--loss", f"{file}:{name}", "--out", str(out)]
    assert main(given) == 0
    (run,) = Record.load(out).runs
    assert {row.status for row in run.rows} == {OK}
    assert {row.name for row in run.rows} == {"unirl_kernels", "eager"}


def test_a_wrong_kernel_shows(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(FILE + WRONG)
    given = ["--kernels", "none", "--peers", "none", "--loss", f"{file}:gate", "--provider", f"{file}:mine"]
    assert main([*SMALL, *given]) != 0
    assert "mine is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bonus", "alone"),
        ("detached", "alone"),
        ("missing", "keep"),
        ("nothing", "the file has no 'nothing'"),
    ],
)
def test_what_the_bench_cannot_give_is_named(
    name: str, says: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--kernels", "cpu", "--peers", "none", "--loss", f"{file}:{name}"]) != 0
    assert says in capsys.readouterr().err
