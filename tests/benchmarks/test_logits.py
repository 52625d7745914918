"""The bench: its parity gate, its figures by hand, its options, its tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.buffers import Ring, last_level_cache_bytes
from benchmarks.inputs import Inputs, Values
from benchmarks.levels import LOGITS
from benchmarks.logits.truth import LogitsTruth
from benchmarks.measure import Timing
from benchmarks.measurement import Measurement
from benchmarks.memory import peak_in_fresh_process
from benchmarks.plot import draw_run, draw_sweeps
from benchmarks.providers import OURS, Provider, Skipped, needs
from benchmarks.readme import renewed
from benchmarks.record import FAILED, OK, WRONG, Record, Row, Run
from benchmarks.selection import chosen
from benchmarks.table import markdown, remarks
from benchmarks.work import DTYPES, FORWARD_BACKWARD, FUSED, MODES, STATS, Work
from tests import ROOT
from unirl_kernels.testing import oracle

RESULTS = ROOT / "benchmarks" / "results"
SMALL = Work(tokens=64, vocab=101, dtype="fp32")


def nothing() -> None: ...


def checked(work: Work, *providers: Provider) -> Measurement:
    measurement = Measurement(work, providers)
    measurement.check(nothing)
    return measurement


def of_eager(change: Callable[[Inputs, Tensor], Values], overwrites: bool = False) -> Provider:
    """A provider that computes log-probabilities right, and then something else."""

    def bind(inputs: Inputs) -> Callable[[Tensor], Values]:
        index = inputs.index.unsqueeze(-1)
        return lambda logits: change(inputs, torch.log_softmax(logits.float(), -1).gather(-1, index).squeeze(-1))

    return Provider("made up", "kernel", bind, overwrites)


RIGHT = of_eager(lambda inputs, logp: inputs.composed(logp))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_pass_the_gate(mode: str, dtype: str) -> None:
    work = replace(SMALL, mode=mode, dtype=dtype)
    measurement = checked(work, *chosen(work, ["cpu", "eager"], ["eager"]))
    status = {row.status for row in measurement.rows.values() if row.name == OURS}
    assert status == {OK}, [row.reasons for row in measurement.rows.values()]
    kernels = ({"rows", "composed"}) if mode == FUSED else {"statistics"}
    variants = {"", " in place"} if mode != STATS else {""}
    ours = {f"{OURS} {b}/{k}{v}" for b in ("cpu", "eager") for k in kernels for v in variants}
    assert {key for key in measurement.rows if key.startswith(OURS)} == ours


@pytest.mark.parametrize("loss", oracle.LOSSES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_every_loss_passes_the_gate(loss: str, on_policy: bool) -> None:
    work = replace(SMALL, loss=loss, on_policy=on_policy)
    measurement = checked(work, *chosen(work, ["cpu"], ["none"]), RIGHT)
    assert {row.status for row in measurement.rows.values()} == {OK}


@pytest.mark.parametrize("loss", oracle.LOSSES)
def test_truth_is_the_oracle(loss: str) -> None:
    """The gate computes loss and gradient by parts, so that they fit into memory."""
    inputs = LOGITS.make(replace(SMALL, loss=loss))
    found = LogitsTruth(inputs)
    logits, batch = inputs.operands[0].double(), inputs.batch
    torch.testing.assert_close(found.loss[torch.float64], oracle.loss(loss, logits, batch), rtol=1e-12, atol=0)
    expected = oracle.gradient(loss, logits, batch).flatten(0, 1)[found.rows]
    torch.testing.assert_close(found.gradient(False)[torch.float64], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("tokens", "sequences"), [(63, 1), (64, 4), (66, 2), (67, 1)])
def test_any_number_of_tokens(tokens: int, sequences: int) -> None:
    work = replace(SMALL, tokens=tokens)
    assert (work.sequences, work.valid_tokens) == (sequences, tokens - sequences)
    measurement = checked(work, *chosen(work, ["cpu/rows"], ["none"]), RIGHT)
    assert {row.status for row in measurement.rows.values()} == {OK}


def _in_bf16(inputs: Inputs, logp: Tensor) -> Values:
    return inputs.composed(logp.to(torch.bfloat16).float())


def _scaled(inputs: Inputs, logp: Tensor) -> Values:
    loss, logp, _ = inputs.composed(logp)
    return Values(loss + 1e-3 * (loss - loss.detach()), logp)  # the gradient alone


def _not_a_number(inputs: Inputs, logp: Tensor) -> Values:
    return inputs.composed(torch.where(torch.arange(logp.shape[1]) == 3, math.nan, logp))


def _at_padding(inputs: Inputs, logp: Tensor) -> Values:
    loss, logp, _ = inputs.composed(logp)
    return Values(loss + 0 * loss.detach() + (logp - logp.detach())[:, -1].sum() * 1e-9, logp)


WRONGS = {
    "logp in bf16": (_in_bf16, "logp"),
    "gradient 0.1 % too long": (_scaled, "gradient"),
    "a NaN": (_not_a_number, "logp"),
    "gradient at an ignored position": (_at_padding, "gradient: an ignored row is not zero"),
}


def check_that_wrong_is_not_fast(work: Work, made_up: Provider, what: str) -> None:
    """A provider that is wrong has no time and stands below the table, with what is wrong; ours are timed."""
    measurement = checked(work, made_up, *chosen(work, ["cpu"], ["none"]))
    run = measurement.time(2, nothing)
    row = next(row for row in run.rows if row.name == "made up")
    assert row.status == WRONG
    assert row.time is None
    assert any(reason.startswith(what) for reason in row.reasons), row.reasons
    assert "made up" not in markdown(run).split("Wrong, and not timed")[0]
    assert any(line.startswith("wrong: made up kernel") for line in remarks(run))
    assert all(row.time is not None for row in run.rows if row.name == OURS)


@pytest.mark.parametrize("name", WRONGS)
def test_a_wrong_provider_is_shown_as_wrong_not_as_fast(name: str) -> None:
    change, what = WRONGS[name]
    check_that_wrong_is_not_fast(SMALL, of_eager(change), what)


def test_others_count_where_one_fails_or_writes_where_it_must_not() -> None:
    def fail(inputs: Inputs, logp: Tensor) -> Values:
        raise ZeroDivisionError("no such kernel\nat all")

    def write(inputs: Inputs) -> Callable[[Tensor], Values]:
        def function(logits: Tensor) -> Values:
            values = RIGHT.bind(inputs)(logits.clone())
            logits.data.zero_()
            return values

        return function

    providers = [Provider("writes", "kernel", write), of_eager(fail), *chosen(SMALL, ["cpu"], ["none"])]
    measurement = checked(SMALL, *providers)
    rows = list(measurement.rows.values())
    assert rows[0].status == WRONG
    assert rows[0].reasons[-1].startswith("operands: overwritten")
    assert rows[1].status == FAILED
    assert rows[1].reasons == ["ZeroDivisionError: no such kernel"]
    assert {row.status for row in rows[2:]} == {OK}


def test_peers_that_cannot_run_say_why() -> None:
    reasons = checked(SMALL, *(peer for peer in LOGITS.peers if peer.name != "compile")).skipped  # takes ten seconds
    assert reasons["quack cross_entropy"] == "runs on a GPU only"
    assert reasons["fla fused_grpo_loss"] == "takes no old log-probabilities: --on-policy"
    assert reasons["eager log_softmax"] == "the same as in fp32"
    assert reasons["torch F.cross_entropy in fp32"] == "computes sft only"
    with pytest.raises(Skipped, match="not installed: pip install no-such-thing"):
        needs("no_such_thing.at_all", "no-such-thing")


def floor_of(work: Work) -> int:
    return LOGITS.floor(work)["floor_bytes"]


def test_floors_by_hand() -> None:
    """4 sequences of 16, of which each ignores one: 60 rows read, 64 written, 404 bytes each."""
    floors = {mode: floor_of(replace(SMALL, mode=mode)) for mode in MODES}
    assert floors == {FUSED: 124 * 404, STATS: 60 * 404, "stats-backward": 124 * 404, FORWARD_BACKWARD: 184 * 404}
    assert floor_of(replace(SMALL, loss="dpo")) == 184 * 404
    assert floor_of(replace(SMALL, tokens=1)) == 2 * 404


def test_a_ring_outgrows_the_cache_and_heals() -> None:
    source = torch.randn(50, 257)
    ring = Ring(source)
    taken = [ring.take() for _ in range(3)]
    assert len({x.data_ptr() for x in taken}) == 3
    assert all(torch.equal(x, source) and x.data_ptr() % 64 == taken[0].data_ptr() % 64 for x in taken)
    versions = [x._version for x in taken]
    taken[0].zero_()
    assert taken[1]._version == versions[1]
    ring.restore(taken[0])
    assert torch.equal(taken[0], source)
    addresses = {ring.take().data_ptr() for _ in range(2 * len(ring))}
    assert len(addresses) == len(ring)
    assert max(addresses) - min(addresses) + source.nbytes > 2 * last_level_cache_bytes(torch.device("cpu")) - 64


def test_memory_in_a_fresh_process() -> None:
    work = Work(tokens=64, vocab=32000, dtype="fp32")
    fresh, in_place = chosen(work, ["cpu/rows"], ["none"])
    gradient = work.logits_bytes
    assert 0.95 * gradient < peak_in_fresh_process(fresh, work) < 1.2 * gradient
    assert peak_in_fresh_process(in_place, work) < 0.1 * gradient
    with pytest.raises(RuntimeError, match="made up"):
        peak_in_fresh_process(RIGHT, work)


def test_command_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "of" / "a.json"
    size = ["--device", "cpu", "--tokens", "64", "--vocab", "101", "--dtype", "bf16", "--rounds", "2", "--no-memory"]
    assert main([*size, "--kernels", "cpu", "--peers", "eager", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "cpu/rows" in shown
    assert "% of copy" in shown
    (run,) = Record.load(out).runs
    assert run.work == Work(tokens=64, vocab=101)
    assert [row.overwrites for row in run.rows if row.kernel == "cpu/rows"] == [False, True]
    assert {row.key: row.status for row in run.rows}["eager log_softmax"] == WRONG
    assert main(["plot", str(out), "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


BAD = {
    "--kernels warp": "--kernels must be among all, none, cpu",
    "--peers nobody": "--peers must be among all, none, compile",
    "--loss dpo --tokens 65": "--tokens must form two equal sequences for pairs, got 65",
    "--device nowhere": "--device nowhere is not available",
    "--device meta": "--device must be of cpu, cuda, got meta",
    "--out /proc/x/y.json": "cannot write to --out /proc/x/y.json",
    "plot missing.json": "missing.json: No such file or directory",
    "plot README.md": "README.md is not a record of the bench",
    "readme --file missing.md": "missing.md: No such file or directory",
}


def check_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the bench get one line, which starts so."""
    assert main([*options.split()]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"python -m benchmarks: {message}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("options", BAD)
def test_bad_options_get_one_line(
    options: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    check_refused(options, BAD[options], capsys)


def made_up_run(tokens: int = 64, vocab: int = 1000) -> Run:
    """A copy at 1 GB/s; ours at half of it, eager ten times as slow."""
    work = Work(tokens=tokens, vocab=vocab, dtype="fp32")
    copy, floor = 2 * work.logits_bytes / 1e9, floor_of(work)
    ours = Row(OURS, "cpu/rows", True, OK, (), _exactly(2 * floor / 1e9), 1000, 1e-6, None, 2e-7)
    eager = Row("eager", "log_softmax", False, OK, (), _exactly(20 * floor / 1e9), 10**9, 1e-5, None, 1e-6)
    wrong = Row("trl", "selective", False, WRONG, ("logp: too far",), None, None, 0.1)
    rows = [ours, eager, wrong]
    return Run(work, 7, 0.5, rows, {"fla x": "absent"}, floor, _exactly(copy), _exactly(copy / 2))


def _exactly(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds)


def made_up_record(*runs: Run) -> Record:
    return Record("2026-01-02T03:04:05+00:00", "0" * 40, False, {"torch": "2"}, {"cpu": "x", "threads": 2}, [*runs])


def test_figures_by_hand() -> None:
    run = made_up_run()
    assert run.copy_bandwidth == pytest.approx(1e9)
    assert run.floor_seconds == pytest.approx(124 * 4000 / 1e9)
    assert run.speedup(run.rows[0]) == pytest.approx(10)
    assert run.speedup(run.rows[2]) is None
    line = next(line for line in markdown(run).splitlines() if "cpu/rows" in line)
    assert line.split(" | ")[3:] == ["0.992", "0.992 – 0.992", "0.496", "50", "10.0", "0", "1.0e-06", "2.0e-07 |"]
    assert remarks(run)[0] == "wrong: trl selective: logp: too far"
    assert remarks(run)[-1].startswith("noisy: other processes took 50 %")
    timed = replace(run.rows[0], time=Timing(1.0, 1.0, 1.0, host=2.5e-5))
    assert f"host, µs per call: {timed.key} 25" in remarks(replace(run, rows=[timed]))


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = made_up_record(made_up_run())
    record.save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json") == record
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "b.json").write_text(text.replace('"schema": 1', '"schema": 0'))
    with pytest.raises(ValueError, match="schema must be 1, got 0"):
        Record.load(tmp_path / "b.json")


def test_pictures_show_what_was_measured() -> None:
    figure = draw_run(made_up_run())
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 0]  # bars: the wrong one has none
    vocabs = [made_up_run(vocab=n) for n in (1000, 2000, 4000)]
    (axes,) = draw_sweeps({"vocab": [vocabs], "tokens": []}).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["floor, at the bandwidth of copy_"].get_ydata()) == [r.floor_seconds * 1e3 for r in vocabs]
    assert list(lines[f"{OURS} cpu/rows in place"].get_xdata()) == [1000, 2000, 4000]


def test_readme_tables_come_from_the_records(tmp_path: Path) -> None:
    made_up_record(made_up_run()).save(tmp_path / "a.json")
    text = "before\n<!-- bench:a -->\nold\n<!-- /bench -->\nafter\n"
    once = renewed(text, tmp_path)
    assert once.startswith("before\n<!-- bench:a -->\n**grpo: loss and gradient")
    assert once.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in once
    assert renewed(once, tmp_path) == once
    with pytest.raises(ValueError, match="1 opened, 0 closed"):
        renewed("<!-- bench:a -->\n", tmp_path)


def test_readme_agrees_with_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert renewed(text, RESULTS) == text, "renew it: python -m benchmarks readme"


def test_committed_results_are_right() -> None:
    files = sorted(RESULTS.glob("*/*.json"))
    assert files
    for file in files:
        for run in Record.load(file).runs:
            assert run.work.dtype in DTYPES
            ours = [row for row in run.rows if row.name == OURS]
            assert ours, file
            assert {row.status for row in ours} == {OK}, file
            if run.work.hidden is None:  # else the matmuls have rounded the logits; the budget knows
                assert all((row.logp_error or 0) <= 2e-6 for row in ours), file
