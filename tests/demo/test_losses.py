"""The demo's model, its losses and comparisons, and the whole demo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo's extras are not installed")
pytest.importorskip("reasoning_gym", reason="the demo's extras are not installed")
pytest.importorskip("matplotlib", reason="the demo's extras are not installed")
pytest.importorskip("rich", reason="the demo's extras are not installed")

import unirl_kernels as uk
from examples.demo import train
from examples.demo.__main__ import main
from examples.demo.compare import FUSED, NAIVE, compare, steps_per_comparison
from examples.demo.computations import Computations, on_hidden, on_logits
from examples.demo.head import NotLinear
from examples.demo.model import LanguageModel, load_model, locate
from examples.demo.sampling import Sampler, Samples
from examples.demo.sequences import Sequences, lay_out, lay_out_prompts
from examples.demo.sources import Degenerate, Source, best_worst_pairs
from tests.demo.cases import CPU, PLAN, VOCAB, six_sources
from unirl_kernels.testing import oracle

GRADIENTS = {"logits": ["grad"], "hidden": ["hidden_grad", "weight_grad"]}


def test_logits_of_shared_prompts_are_those_of_full_sequences(model: LanguageModel) -> None:
    model.network.double()
    torch.manual_seed(1)
    texts = [torch.randint(1, VOCAB, (n,)).tolist() for n in (9, 5, 4, 6, 3)]
    (a, b), completions = texts[:2], texts[2:]
    sequences = lay_out(lay_out_prompts([a, b], CPU), completions, [0, 1, 0])
    weights = torch.randn(3, sequences.target.shape[1], VOCAB, dtype=torch.float64)
    valid = sequences.target != uk.IGNORE
    shared = model.logits(sequences)
    (shared[valid] * weights[valid]).sum().backward()
    parameter = model.network.model.layers[0].self_attn.k_proj.weight  # gets its gradient through the cache
    gradient, parameter.grad = parameter.grad, None
    for i, (prompt, completion) in enumerate(zip((a, b, a), completions, strict=True)):
        full = model.network(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(shared[i, : len(completion)], full)
        (full * weights[i, : len(completion)]).sum().backward()
    # The model's norms compute in fp32 even here. Losing what comes through the cache would be an error of order 1.
    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_samples_of_a_padded_batch_are_scored_as_drawn(model: LanguageModel, sampler: Sampler) -> None:
    """Log-probabilities of a sample do not depend on the other samples it is batched with."""
    samples = sampler.samples(model, sampler.questions.draw(2))
    together = model.log_probs(samples.sequences, PLAN)
    for i in range(len(together)):
        alone: Sequences = samples.sequences.select(torch.tensor([i]))
        torch.testing.assert_close(model.log_probs(alone, PLAN)[0], together[i], rtol=1e-4, atol=1e-5)


def test_a_step_in_several_passes_is_the_step_of_the_whole_batch(
    folder: Path, sampler: Sampler, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_step(size: int) -> tuple[train.Step, Tensor]:
        monkeypatch.setattr(train, "SEQUENCES_PER_PASS", size)
        policy = load_model(locate(str(folder)), CPU, torch.float32)
        source = six_sources(policy, sampler, samples)[5]
        optimizer = torch.optim.SGD(policy.network.parameters(), lr=0.1)
        step = train.optimise(policy, optimizer, source.sequences, source.batch, source.loss, plan=PLAN)
        assert optimizer.param_groups[0]["params"][0].grad is None
        return step, policy.network.lm_head.weight.detach()

    torch.manual_seed(3)
    whole, weight = after_step(100)
    torch.manual_seed(3)
    parts, same_weight = after_step(5)  # 12 sequences: parts of 5, 5 and 2
    torch.testing.assert_close(same_weight, weight)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4)
    assert {"kl", "entropy"} <= set(whole.metrics)


def _ways(kind: str, model: LanguageModel, source: Source) -> Computations:
    with torch.no_grad():
        if kind == "logits":
            return on_logits(source, model.logits(source.sequences), PLAN)
        assert model.head is not None
        return on_hidden(source, model.hidden(source.sequences), model.head, PLAN)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_comparison_passes_a_right_loss_and_fails_a_wrong_one(
    model: LanguageModel, sampler: Sampler, samples: Samples, kind: str
) -> None:
    source = six_sources(model, sampler, samples)[5]
    steps: list[int] = []
    row = compare(source, _ways(kind, model, source), PLAN, 2, lambda: steps.append(1))
    assert len(steps) == steps_per_comparison(2)
    assert list(row.checks) == ["loss", *GRADIENTS[kind]]
    assert not any(check.failed for check in row.checks.values())
    assert row.tokens == int(samples.sequences.mask.sum())
    assert set(row.time) == set(row.peak_bytes) == {FUSED, NAIVE}

    wrong = Source(source.algorithm, uk.grpo(beta=0.02), source.data, source.sequences, source.batch)
    row = compare(wrong, _ways(kind, model, wrong), PLAN, 2)
    assert all(check.failed for check in row.checks.values())


def test_two_equal_samples_are_refused(model: LanguageModel, sampler: Sampler, samples: Samples) -> None:
    source = six_sources(model, sampler, samples)[3]
    ids, mask = (x.chunk(2)[0].repeat(2, 1) for x in (source.sequences.ids, source.sequences.mask))
    prompt_of = source.sequences.prompt_of.chunk(2)[0].repeat(2)
    sequences = replace(source.sequences, prompt_of=prompt_of, ids=ids, mask=mask)
    target = source.batch.target.chunk(2)[0].repeat(2, 1)
    ref = source.batch.ref_logp
    assert ref is not None
    batch = uk.Batch(target, ref_logp=ref.chunk(2)[0].repeat(2, 1))
    equal = replace(source, sequences=sequences, batch=batch)
    with pytest.raises(Degenerate, match="DPO: the data is degenerate: naive fp32 has no digit of its weight_grad"):
        compare(equal, _ways("hidden", model, equal), PLAN, 2)
    same = replace(samples, sequences=samples.sequences.select(torch.zeros(len(samples.verdicts), dtype=torch.int64)))
    with pytest.raises(Degenerate, match="DPO: best and worst sample of each question are equal"):
        best_worst_pairs(same, ref[:1].expand(len(samples.verdicts), -1))


@pytest.mark.parametrize(
    ("kind", "gradient", "place"),
    [
        ("logits", "grad", "token"),
        ("logits", "grad", "padding"),
        ("hidden", "hidden_grad", "token"),
        ("hidden", "hidden_grad", "padding"),
        ("hidden", "weight_grad", "word"),
    ],
)
def test_comparison_sees_a_gradient_that_is_wrong_at_one_place(
    model: LanguageModel, sampler: Sampler, samples: Samples, kind: str, gradient: str, place: str
) -> None:
    source = six_sources(model, sampler, samples)[5]
    computations = _ways(kind, model, source)

    def fused() -> tuple[Tensor, dict[str, Tensor]]:
        loss, gradients = computations.fused()
        wrong = gradients[gradient].clone()
        rows = {"token": source.batch.valid, "padding": ~source.batch.valid}.get(place, torch.ones(VOCAB))
        wrong[tuple(rows.nonzero()[0].tolist())][0] += 1e-4
        return loss, gradients | {gradient: wrong}

    row = compare(source, replace(computations, fused=fused), PLAN, 2)
    assert [name for name, check in row.checks.items() if check.failed] == [gradient]


@pytest.mark.parametrize("algorithm", range(6))
def test_comparison_on_hidden_states_passes_every_algorithm_in_bf16(
    folder: Path, sampler: Sampler, samples: Samples, algorithm: int
) -> None:
    model = load_model(locate(str(folder)), CPU, torch.bfloat16)
    source = six_sources(model, sampler, samples)[algorithm]
    row = compare(source, _ways("hidden", model, source), PLAN, 2)
    assert not any(check.failed for check in row.checks.values())


def _run(folder: Path, out: Path, *options: str) -> int:
    small = ["--questions", "2", "--group", "3", "--max-new-tokens", "4", "--rounds", "2", "--steps", "1"]
    where = ["--device", "cpu", "--backend", "eager", "--model", str(folder), "--out", str(out)]
    return main([*where, *small, *options])


def test_whole_demo(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(folder, tmp_path / "new" / "out") == 0
    shown = capsys.readouterr().out
    for name in ("SFT", "RFT", "Online RFT", "DPO", "PPO", "GRPO", "GRPO step 1: loss"):
        assert name in shown
    assert (tmp_path / "new" / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "new" / "out" / "summary.json").read_text())
    assert list(summary) == ["model", "vocab", "backend", "rows", "linear_rows", "grpo_steps"]
    assert (summary["model"], summary["vocab"], summary["backend"]) == ("tiny", VOCAB, "eager")
    for key, kind in (("rows", "logits"), ("linear_rows", "hidden")):
        assert len(summary[key]) == 6
        numbers = ["tokens", "loss", "loss_error", *(f"{name}_error" for name in GRADIENTS[kind]), "fused_s", "naive_s"]
        sizes = ["fused_peak_bytes", "naive_peak_bytes"]
        for row in summary[key]:
            assert list(row) == ["algorithm", "equation", *numbers, *sizes]
            assert all(isinstance(row[name], int | float) for name in numbers)
            assert all(isinstance(row[name], int) for name in ("tokens", *sizes))
            assert row["fused_s"] > 0
    assert len(summary["grpo_steps"]) == 1
    assert list(summary["grpo_steps"][0]) == ["loss", "reward", "kl"]


def test_demo_fails_and_says_which_error_is_too_large(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = oracle.ppo
    monkeypatch.setitem(oracle.LOSSES, "ppo", lambda logits, batch: 1.01 * real(logits, batch))
    assert _run(folder, tmp_path, "--dtype", "bf16", "--steps", "0") == 1
    errors = capsys.readouterr().err.splitlines()[-1]
    assert errors.startswith("python -m examples.demo: PPO: ")
    assert "PPO: gradient error" in errors
    assert "PPO on hidden states: d_weight error" in errors
    assert "exceeds its tolerance" in errors
    assert not any(f"{name}: " in errors for name in ("SFT", "RFT", "DPO", "GRPO"))  # right in bf16, too


def test_demo_trains_on_logits_where_the_head_needs_them_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(network: Any) -> uk.Readout:
        raise NotLinear("its logits are secret")

    monkeypatch.setattr("examples.demo.model.readout_of", refuse)
    assert _run(folder, tmp_path) == 0
    assert "tiny is trained on all its logits: its logits are secret" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["linear_rows"] == []
    assert (tmp_path / "demo.png").exists()
