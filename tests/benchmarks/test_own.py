"""A user's own provider: correct ones are timed, wrong ones are not, and one that cannot run gives a one-line error."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.memory import peak_in_fresh_process
from benchmarks.own import own
from benchmarks.record import FAILED, OK, WRONG, Record, Row
from benchmarks.work import FORWARD_BACKWARD, FUSED, STATS, Work

KERNELS = """
import neighbour
import torch
import torch.nn.functional as F
import unirl_kernels as uk


def sft(logits, batch):
    return F.cross_entropy(logits.float().flatten(0, 1), batch.target.flatten())


def sft_and_logp(logits, batch):
    used = batch.target.clamp(min=0).unsqueeze(-1)
    logp = torch.log_softmax(logits.float(), -1).gather(-1, used).squeeze(-1)
    return -logp[batch.valid].mean(), logp


def too_large(logits, batch):
    return neighbour.FACTOR * sft(logits, batch)


def wrong_gradient(logits, batch):
    return sft(logits.detach(), batch) + 0 * logits.float().sum()


def in_place(logits, batch):
    return uk.fused_loss(logits, batch, uk.sft(), plan=uk.Plan(overwrite_logits=True)).loss


in_place.overwrites = True


def secretly_in_place(logits, batch):
    return in_place(logits, batch)


def statistics(logits, batch):
    stats = uk.token_stats(logits, batch.target)
    return stats.logp, stats.entropy


def logp_alone(logits, batch):
    return statistics(logits, batch)[0]


def head(hidden, weight, batch):
    return sft(hidden.float() @ weight.float().t(), batch)


class Head:
    def __call__(self, hidden, weight, batch, scale=1.0):
        return head(scale * hidden, weight, batch)


head_object = Head()


def no_tensor(logits, batch):
    return 1.0


def by_token(logits, batch):
    return batch.target.float()


def three(logits, batch):
    return sft(logits, batch), None, None


def hopeless(logits, batch):
    raise ZeroDivisionError("no such kernel")


def without_batch(logits):
    return logits.sum()


number = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """With a neighbour that it imports."""
    (tmp_path / "neighbour.py").write_text("FACTOR = 1.001\n")
    file = tmp_path / "kernels.py"
    file.write_text(KERNELS)
    return file


def measured(file: Path, names: list[str], *options: str) -> tuple[int, list[Row]]:
    """The exit code, and the rows of the providers."""
    out = file.with_name("out.json")
    small = ["--device", "cpu", "--loss", "sft", "--dtype", "fp32", "--tokens", "64", "--vocab", "101", "--rounds", "2"]
    chosen = ["--kernels", "cpu", "--peers", "none", "--no-memory", "--out", str(out)]
    providers = [word for name in names for word in ("--provider", f"{file}:{name}")]
    code = main([*small, *chosen, *providers, *options])
    (run,) = Record.load(out).runs
    assert any(row.kernel.startswith("cpu/") and row.status == OK for row in run.rows)
    return code, [row for row in run.rows if row.name == str(file)]


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["sft", "sft_and_logp", "in_place"], []),
        (["statistics", "logp_alone"], ["--mode", STATS]),
        (["statistics", "logp_alone"], ["--mode", FORWARD_BACKWARD]),
        (["head", "head_object"], ["--hidden", "16"]),
    ],
)
def test_right_ones_are_timed(file: Path, names: list[str], options: list[str]) -> None:
    code, rows = measured(file, names, *options)
    assert code == 0
    assert [(row.kernel, row.status) for row in rows] == [(name, OK) for name in names]
    assert all(row.time is not None for row in rows)
    assert [row.overwrites for row in rows] == [name == "in_place" for name in names]


WRONGS = {
    "too_large": (WRONG, "loss: "),
    "wrong_gradient": (WRONG, "gradient: "),
    "secretly_in_place": (WRONG, "operands: overwritten"),
    "hopeless": (FAILED, "ZeroDivisionError: no such kernel"),
    "no_tensor": (FAILED, "TypeError: loss must be a tensor, got float"),
    "by_token": (FAILED, "TypeError: loss must have shape [], got [4, 16]"),
    "three": (FAILED, "TypeError: the function must return loss or (loss, logp), got a tuple of 3"),
}


def test_wrong_ones_are_not_timed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong provider is not timed, and the command fails."""
    code, rows = measured(file, ["sft", *WRONGS])
    assert code == 1
    assert rows[0].status == OK
    for row, (status, reason) in zip(rows[1:], WRONGS.values(), strict=True):
        assert row.status == status, row
        assert row.time is None
        assert any(text.startswith(reason) for text in row.reasons), row.reasons
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "too_large is wrong: loss: " in said
    assert "hopeless failed: ZeroDivisionError" in said


def test_memory_in_a_fresh_process(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is found from whatever folder the bench runs in."""
    work = Work("sft", FUSED, tokens=64, vocab=32000, dtype="fp32")
    monkeypatch.chdir(file.parent)
    assert 0.95 * work.logits_bytes < peak_in_fresh_process(own("kernels.py:sft", work), work)
    assert peak_in_fresh_process(own("kernels.py:in_place", work), work) < 0.1 * work.logits_bytes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("kernels.py:without_batch", "must take (logits, batch), got (logits)"),
        ("kernels.py:head", "must take (logits, batch), got (hidden, weight, batch)"),
        ("kernels.py:number", "must be a function, got int"),
        ("kernels.py:nobody", ": the file has no 'nobody'; it has sft, sft_and_logp, "),
        ("nowhere.py:sft", ": there is no file "),
        ("kernels.py", " must be FILE.py:NAME, got "),
    ],
)
def test_what_cannot_be_run_gets_one_line(file: Path, name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", "64", "--vocab", "101", "--provider", str(file.parent / name)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("python -m benchmarks: --provider ")
    assert says in said


def test_help_has_the_signature(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "FUNCTION(logits, batch), or FUNCTION(hidden, weight, batch) with --hidden" in shown


def test_help_names_the_defaults_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("triton/two_sweep (default: all)", "of the random numbers (default: 0)", "logits; by default 4096"):
        assert text in shown
    assert "None" not in shown
    assert "False" not in shown
    assert "[]" not in shown
