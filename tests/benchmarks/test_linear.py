"""The bench on linear heads: its parity gate, its figures by hand, its peers, its options, tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.buffers import Ring
from benchmarks.inputs import Inputs, Values
from benchmarks.levels import LINEAR
from benchmarks.linear import matmuls
from benchmarks.linear.floor import BareMatmuls
from benchmarks.linear.model import DEVICES, SHAPES, before, predict
from benchmarks.linear.model import chosen as chosen_sizes
from benchmarks.linear.truth import LinearTruth
from benchmarks.measure import Timing
from benchmarks.memory import peak_in_fresh_process
from benchmarks.plot import draw_run
from benchmarks.providers import OURS, Provider
from benchmarks.readme import renewed
from benchmarks.record import OK, WRONG, Record, Row, Run, title
from benchmarks.selection import chosen
from benchmarks.table import markdown
from benchmarks.work import FORWARD_BACKWARD, FUSED, LINEAR_MODES, STATS, Work
from tests.benchmarks.test_logits import check_refused, check_that_wrong_is_not_fast, checked, made_up_record
from unirl_kernels.backends import cpu
from unirl_kernels.head.sizes import Sizes
from unirl_kernels.testing import oracle

SMALL = Work(tokens=64, vocab=101, dtype="fp32", hidden=24)


@pytest.mark.parametrize("device", DEVICES)
def test_what_heads_are_predicted_to_take(device: str) -> None:
    """Nine tenths of three matmuls where a token's matmuls are long and all gradients fit; below 3 GB."""
    for tokens, d, vocab in SHAPES:
        found = predict(DEVICES[device], tokens, d, vocab)
        old = predict(DEVICES[device], tokens, d, vocab, before(tokens, vocab))
        assert old.share < found.share < 1
        if chosen_sizes(DEVICES[device], tokens, d, vocab).group >= tokens:
            assert found.bytes <= 3.0e9
            assert found.share >= (0.9 if d >= 3584 else 0.8)


@pytest.mark.parametrize("device", DEVICES)
def test_no_other_sizes_are_predicted_to_take_less(device: str) -> None:
    """But for what the bandwidth of the device makes of it: sizes are the same on all."""
    memory = 11 * 2**28
    for tokens, d, vocab in (*SHAPES, (20000, 5120, 151936)):
        best = min(
            predict(DEVICES[device], tokens, d, vocab, Sizes(chunk, group)).seconds
            for chunk in range(512, memory // 3 // (4 * vocab) // 128 * 128 + 1, 128)
            for group in range(chunk, (memory - 4 * vocab * chunk) // (2 * vocab) + 1, 128)
        )
        assert predict(DEVICES[device], tokens, d, vocab).seconds < 1.005 * best


@pytest.mark.skipif(bool(cpu.matmuls_unavailable(torch.float32)), reason="no matmuls of our own")
def test_every_way_to_multiply_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matmuls, "SHAPES", ((8, 16, 64),))
    file = tmp_path / "matmuls.json"
    matmuls.main([str(file), "--rounds", "2", "--dtypes", "bf16", "fp16"])
    of_bf16, of_fp16 = json.loads(file.read_text())["runs"]
    for run, variants in ((of_bf16, cpu.matmul_variants()), (of_fp16, ["panels-fp32", "brgemm-fp32"])):
        timed = [
            f"{variant} {what}"
            for what in ("matmuls", "head")
            for variant in variants
            if variant in cpu.matmul_variants()
        ]
        assert list(run["rows"]) == ["torch.mm", *timed]
        for row in run["rows"].values():
            assert row["flops"] * row["seconds"] == pytest.approx(6 * 8 * 16 * 64)


COMPILED = {"grpo": ["compile", "liger"], "sft": ["compile", "cce"]}
"""Peers that take ten seconds to compile where they take part."""


def of_eager(change: Callable[[Values], Values]) -> Provider:
    """A provider that computes everything right, and then something else."""

    def bind(inputs: Inputs) -> Callable[[Tensor, Tensor], Values]:
        index = inputs.index.unsqueeze(-1)

        def function(hidden: Tensor, weight: Tensor) -> Values:
            logits = torch.nn.functional.linear(hidden.float(), weight.float())
            return change(inputs.composed(torch.log_softmax(logits, -1).gather(-1, index).squeeze(-1)))

        return function

    return Provider("made up", "kernel", bind)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("mode", LINEAR_MODES)
def test_heads_pass_the_gate(mode: str, dtype: str) -> None:
    work = replace(SMALL, mode=mode, dtype=dtype)
    measurement = checked(work, *chosen(work, ["cpu", "eager"], ["eager"]))
    rows = {key: row for key, row in measurement.rows.items() if row.name == OURS or "in fp32" in key}
    assert {row.status for row in rows.values()} == {OK}, [row.reasons for row in rows.values()]
    kernel = "rows" if mode == FUSED else "statistics"
    assert set(rows) == {f"{OURS} cpu/{kernel}", f"{OURS} eager/{kernel}", "eager F.linear in fp32"}
    given = {FUSED: (True, True), STATS: (False, False), FORWARD_BACKWARD: (False, True)}[mode]
    assert {(row.loss_error is not None, row.d_weight_error is not None) for row in rows.values()} == {given}
    assert all(row.logp_error is not None for row in rows.values())


@pytest.mark.parametrize("loss", oracle.LOSSES)
def test_truth_is_the_oracle(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate computes loss and gradients from chunks of the logits, here of five positions."""
    monkeypatch.setattr("benchmarks.linear.inputs.CHUNK_BYTES", 5 * 101 * 8)
    inputs = LINEAR.make(replace(SMALL, loss=loss))
    truth = LinearTruth(inputs)
    hidden, weight = (x.double().requires_grad_() for x in inputs.operands)
    expected = oracle.loss(loss, hidden @ weight.t(), inputs.batch)
    torch.testing.assert_close(truth.loss[torch.float64], expected.detach(), rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    found = truth.check(Values(expected), gradients)
    assert not found.problems
    assert max(found.relative.values()) < 1e-10, found.relative
    assert all(row.status == OK for row in checked(inputs.work, *chosen(inputs.work, ["cpu"], ["none"])).rows.values())


def test_of_a_large_weight_targets_and_a_sample_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.linear.truth.CHECKED_BYTES", 11 * SMALL.vocab * 8)
    inputs = LINEAR.make(replace(SMALL, vocab=2000))
    columns = LinearTruth(inputs).columns
    targets = inputs.index.unique()
    assert set(targets.tolist()) | {0, 1999} <= set(columns.tolist())
    assert 0 < len(columns) - len(targets) <= -(-11 * 101 // 24)


def _longer(values: Values) -> Values:
    assert values.loss is not None
    return Values(values.loss + 0.1 * (values.loss - values.loss.detach()), values.logp)


def _rounded(values: Values) -> Values:
    assert values.logp is not None
    return values._replace(logp=values.logp.to(torch.bfloat16).float())


def _not_a_number(values: Values) -> Values:
    assert values.loss is not None
    return Values(values.loss * math.nan)


def _at_padding(values: Values) -> Values:
    assert values.loss is not None
    assert values.logp is not None
    return Values(values.loss + (values.logp - values.logp.detach())[:, -1].sum() * 1e-9, values.logp)


WRONGS = {
    "gradients 10 % too long": (_longer, "d_weight: relative error"),
    "logp in bf16": (_rounded, "logp"),
    "a NaN": (_not_a_number, "loss"),
    "gradient at an ignored token": (_at_padding, "d_hidden: an ignored token is not zero"),
}


@pytest.mark.parametrize("name", WRONGS)
def test_a_wrong_provider_is_shown_as_wrong_not_as_fast(name: str) -> None:
    change, what = WRONGS[name]
    check_that_wrong_is_not_fast(SMALL, of_eager(change), what)


def test_one_that_writes_into_the_weight_is_wrong() -> None:
    def bind(inputs: Inputs) -> Callable[[Tensor, Tensor], Values]:
        def function(hidden: Tensor, weight: Tensor) -> Values:
            values = of_eager(lambda values: values).bind(inputs)(hidden.clone(), weight.clone())
            weight.data.zero_()
            return values

        return function

    measurement = checked(SMALL, Provider("writes", "kernel", bind), of_eager(lambda values: values))
    rows = list(measurement.rows.values())
    assert rows[0].reasons[-1].startswith("operands: overwritten")
    assert rows[1].status == OK


@pytest.mark.parametrize("loss", ["grpo", "sft"])
def test_peers_are_right_or_say_why_not(loss: str) -> None:
    work = replace(SMALL, loss=loss)
    measurement = checked(work, *(peer for peer in LINEAR.peers if peer.name not in COMPILED[loss]))
    assert {row.status for row in measurement.rows.values()} == {OK}, measurement.rows
    reasons = measurement.skipped
    assert reasons["eager F.linear"] == "another row says it: the operands are fp32"
    if loss == "grpo":
        assert reasons["torch F.linear_cross_entropy"] == "computes sft only"
        assert reasons["cce linear_cross_entropy"] == "computes sft only"
    elif hasattr(torch.nn.functional, "linear_cross_entropy"):
        assert "torch F.linear_cross_entropy, chunked" in measurement.rows


def test_a_peer_that_this_torch_lacks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    peers = [peer for peer in LINEAR.peers if peer.name == "torch"]
    assert set(checked(replace(SMALL, loss="sft"), *peers).skipped.values()) == {"needs torch 2.13"}


def test_peers_that_cannot_run_say_why() -> None:
    peers = [peer for peer in LINEAR.peers if peer.name == "liger"]
    assert checked(replace(SMALL, loss="sft"), *peers).skipped == {
        "liger fused_linear_cross_entropy": "runs on a GPU only",
        "liger fused_linear_cross_entropy, larger chunks": "runs on a GPU only",
        "liger LigerFusedLinearGRPOLoss": "computes grpo and ppo only",
    }
    assert set(checked(replace(SMALL, mode=STATS), *peers).skipped.values()) == {"computes losses only, no statistics"}


def test_logits_look_like_a_trained_models() -> None:
    inputs = LINEAR.make(Work(tokens=256, vocab=1009, dtype="fp32", hidden=256))
    hidden, weight = inputs.operands
    logits = hidden @ weight.t()
    assert logits.std().item() == pytest.approx(2, abs=0.2)
    p = torch.softmax(logits, -1).gather(-1, inputs.index.unsqueeze(-1))
    assert p.min().item() < 1e-3
    assert p.max().item() > 0.9


def test_operations_by_hand() -> None:
    """64 tokens, 24 numbers each, 101 columns: three matmuls, or one."""
    flops = {mode: LINEAR.floor(replace(SMALL, mode=mode))["flops"] for mode in LINEAR_MODES}
    matmul = 2 * 64 * 24 * 101
    assert flops == {FUSED: 3 * matmul, STATS: matmul, FORWARD_BACKWARD: 3 * matmul}


@pytest.mark.parametrize("mode", LINEAR_MODES)
def test_matmuls_are_those_of_the_head(mode: str) -> None:
    work = replace(SMALL, mode=mode)
    hidden, weight = operands = LINEAR.make(work).operands
    matmuls = BareMatmuls(work, [Ring(x) for x in operands])
    matmuls()
    assert matmuls._outputs is not None
    logits, d_hidden, d_weight = matmuls._outputs
    expected = hidden.flatten(0, 1) @ weight.t()
    torch.testing.assert_close(logits, expected)
    if work.has_gradient:
        torch.testing.assert_close(d_hidden, expected @ weight)
        torch.testing.assert_close(d_weight, expected.t() @ hidden.flatten(0, 1))


def test_memory_beyond_the_gradients_is_that_of_a_chunk() -> None:
    chunk = 2**24
    work = Work(tokens=512, vocab=32000, dtype="fp32", hidden=128, chunk_bytes=chunk)
    (ours,) = chosen(work, ["cpu"], ["none"])
    row = Row(OURS, "cpu/rows", False, OK, peak_extra_bytes=peak_in_fresh_process(ours, work))
    extra = LINEAR.columns.extra_bytes(made_up_run(work), row)
    assert extra is not None
    assert 0.7 * chunk < extra < 2 * chunk


def test_command_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "linear-bf16.json"
    size = ["--device", "cpu", "--tokens", "64", "--hidden", "24", "--vocab", "101", "--rounds", "2", "--no-memory"]
    assert main([*size, "--kernels", "cpu", "--peers", "eager", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "× matmuls" in shown
    assert "64 × 24 × 101 bf16" in shown
    (run,) = Record.load(out).runs
    assert run.work == Work(tokens=64, vocab=101, hidden=24)
    assert {row.key: row.status for row in run.rows}["eager F.linear"] == WRONG
    assert run.copy is None
    assert main(["plot", str(out), "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "linear-bf16.png").stat().st_size > 10_000
    text = renewed("<!-- bench:linear-bf16 -->\n<!-- /bench -->\n", tmp_path)
    assert "| unirl_kernels | cpu/rows |" in text
    assert renewed(text, tmp_path) == text


BAD = {
    "--hidden 24 --mode stats-backward": "--mode must be among fused, stats, forward-backward for a linear head, got",
    "--hidden 24 --sweep": "--sweep is about logits: not with --hidden",
    "--hidden 24 --overwrite": "--overwrite is about logits: not with --hidden",
    "--chunk-bytes 1000": "--chunk-bytes is about linear heads: give --hidden",
    "--hidden 24 --peers nobody": "--peers must be among all, none, cce, compile, eager",
    "--hidden 24 --kernels cpu/composed": "--kernels must be among all, none, cpu, cpu/rows",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_options_get_one_line(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(options, BAD[options], capsys)


def made_up_run(work: Work = SMALL) -> Run:
    """BareMatmuls at 1 Gflop/s; ours in twice their time, eager in four times."""
    flops = LINEAR.floor(work)["flops"]
    gradients = 4 * (work.tokens + work.vocab) * (work.hidden or 0)
    errors = {"loss_error": 1e-7, "d_hidden_error": 2e-7, "d_weight_error": 3e-7}
    matmuls, ours, eager = (Timing(*[n * flops / 1e9] * 3) for n in (1, 2, 4))
    rows = [
        Row(OURS, "cpu/rows", False, OK, (), ours, gradients + 5_000_000, 1e-6, **errors),
        Row("eager", "F.linear", False, OK, (), eager, gradients // 2, 1e-5, **errors),
        Row("trl", "chunked", False, WRONG, ("d_weight: too far",), None, None, 0.1),
    ]
    return Run(work, 7, 0, rows, {}, flops=flops, matmuls=matmuls)


def test_figures_by_hand() -> None:
    run = made_up_run()
    assert title(run.work) == "grpo: loss and gradients of hidden states and weight; 64 × 24 × 101 fp32"
    assert run.floor_seconds == pytest.approx(6 * 64 * 24 * 101 / 1e9)
    assert run.speedup(run.rows[0]) == pytest.approx(2)
    lines = [line.split(" | ") for line in markdown(run).splitlines()]
    figures = {line[0]: line[4:] for line in lines if len(line) > 4}
    assert figures["| torch"] == ["1.00", "1", "", "", "", "", "", " |"]
    assert figures["| unirl_kernels"] == ["2.00", "0.5", "2.0", "5", "1.0e-07", "1.0e-06", "2.0e-07", "3.0e-07 |"]
    assert figures["| eager"][:4] == ["4.00", "0.25", "1.0", "0"]


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = made_up_record(made_up_run())
    record.save(tmp_path / "a.json")
    assert Record.load(tmp_path / "a.json") == record


def test_pictures_show_what_was_measured() -> None:
    figure = draw_run(made_up_run())
    assert [len(axes.patches) for axes in figure.axes] == [2, 2, 0]  # bars: the wrong one has none
    assert figure.axes[1].patches[0].get_width() == pytest.approx(5)
    assert figure.axes[1].get_title(loc="left") == "Peak memory beyond inputs and gradients"
