"""TRL's trainers train alike on their own loss head and on this package's: logs, samples and parameters."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import trl

from tests.integrations.trl.heads import FUSED, exact, reordered
from tests.integrations.trl.models import FAMILIES, SENTENCES, byte_pairs, load, save
from unirl_kernels.integrations.trl import FusedHead, LogitFunctions, patch
from unirl_kernels.testing.budgets import error

RELATIVE = 1e-5
"""What a logged value may be off by, relative to itself, and a parameter, relative to the change that training made.

Beyond that, since terms may cancel, twice what rounding does: the range of TRL's own values over the run as it is and
``ORDERS`` runs whose head takes words and features in other orders; and for a parameter the rounding of each step.
"""

ORDERS = 8
STEPS = 3
CLOCKS = ("runtime", "per_second", "step_time", "flos")


@dataclass
class Seen:
    """What a training run logged, sampled, and made of its model's parameters."""

    logs: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    samples: list[str] = field(default_factory=list)

    @property
    def change(self) -> Tensor:
        """Of all parameters, float64."""
        return torch.cat([(self.after[key].double() - before).flatten() for key, before in self.before.items()])


@dataclass(frozen=True)
class Case:
    """A trainer, its options, and what it learns from."""

    trainer: Any
    config: Any
    rows: dict[str, list[Any]]
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    logged: Sequence[str] = ()


TRAINING = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 0,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
    # Changes in proportion to the gradient: Adam makes a large one of a gradient that is but rounding.
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 1e6,
}


def halves(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[: len(words) // 2]) or "the", " " + " ".join(words[len(words) // 2 :])


PROMPTS, ENDS = map(list, zip(*map(halves, SENTENCES), strict=True))
TEXTS = {"text": SENTENCES}
PAIRS = {"prompt": PROMPTS, "chosen": ENDS, "rejected": ENDS[1:] + ENDS[:1]}
VERDICTS = {"prompt": PROMPTS, "completion": ENDS, "label": [True, False] * 4}
QUESTIONS = {"prompt": PROMPTS}
SAMPLING = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.7, "num_iterations": 2}
BONUS = {"entropy_coef": 0.01}
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}
GRPO = partial(Case, trl.GRPOTrainer, trl.GRPOConfig, QUESTIONS)
DPO = partial(Case, trl.DPOTrainer, trl.DPOConfig, PAIRS)
SFT = partial(Case, trl.SFTTrainer, trl.SFTConfig, TEXTS)

CASES = {
    "grpo": GRPO({**SAMPLING, **BONUS, "beta": 0.04}, logged=("kl", "entropy", "reward")),
    "grpo-without-kl": GRPO({**SAMPLING, **BONUS, "beta": 0.0, "loss_type": "dr_grpo"}, logged=("entropy", "reward")),
    "grpo-sequences": GRPO({**SAMPLING, **GSPO, "beta": 0.04}, logged=("kl", "entropy")),
    # A quantile that no token's entropy is near: rounding would decide on which side of it the token falls.
    "grpo-high-entropy": GRPO({**SAMPLING, "beta": 0.0, "top_entropy_quantile": 0.2}, logged=("entropy",)),
    "rloo": Case(trl.RLOOTrainer, trl.RLOOConfig, QUESTIONS, SAMPLING, logged=("kl", "entropy", "reward")),
    "dpo": DPO(logged=("rewards/margins", "logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy")),
    "dpo-weighted": DPO({"use_weighting": True}, logged=("rewards/margins",)),
    "dpo-softcap": DPO(family="softcap", logged=("rewards/margins",)),
    "dpo-scale": DPO(family="scale", logged=("rewards/margins",)),
    "kto": Case(trl.KTOTrainer, trl.KTOConfig, VERDICTS, logged=("kl", "rewards/margins", "logits/chosen")),
    "sft-dft": SFT({"loss_type": "dft"}),
}
if FUSED:  # before, SFT computes its likelihoods in another way, which is left alone
    CASES |= {
        "sft": SFT(logged=("entropy", "mean_token_accuracy")),
        "sft-softcap": SFT(family="softcap", logged=("entropy",)),
        "sft-scale": SFT(family="scale", logged=("entropy",)),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family on disk."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save(family, folder)
    return folders


Head = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Seen]]:
    """Train a case on TRL's own head, or on that of a context."""
    out = tmp_path_factory.mktemp("out")
    gc.freeze()  # a trainer collects garbage, and would look through all that is imported: half of its time

    def train(name: str, head: Head = nullcontext, **options: Any) -> Seen:
        case = CASES[name]
        config = case.config(output_dir=str(out), **{**TRAINING, **case.options, **options})
        model = load(case.family, folders[case.family])
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        samples: list[str] = []
        given: dict[str, Any] = {}
        if "num_generations" in case.options:

            def vowels(completions: list[str], **_: Any) -> list[float]:
                samples.extend(completions)
                return [sum(letter in "aeiou" for letter in text) / len(text or " ") for text in completions]

            given["reward_funcs"] = vowels
        rows = datasets.Dataset.from_dict(case.rows)
        with head():
            trainer = case.trainer(model, args=config, train_dataset=rows, processing_class=byte_pairs(), **given)
            trainer.train()
        after = {key: value.detach().clone() for key, value in model.named_parameters()}
        return Seen(trainer.state.log_history, before, after, samples)

    yield train
    gc.unfreeze()


@pytest.fixture(scope="module")
def own(run: Callable[..., Seen]) -> Callable[[str], list[Seen]]:
    """A case on TRL's own head, as it is and in other orders."""

    @functools.cache
    def train(name: str) -> list[Seen]:
        return [run(name), *(run(name, partial(reordered, seed)) for seed in range(ORDERS))]

    return train


def ranges(runs: Sequence[Seen]) -> dict[str, float]:
    """By how much the runs differ in what they logged, at most, for each name."""
    found: dict[str, float] = {}
    for logs in zip(*(run.logs for run in runs), strict=True):
        for key in logs[0]:
            values = [log[key] for log in logs]
            found[key] = max(found.get(key, 0.0), max(values) - min(values))
    return found


def differences(got: Seen, own: Sequence[Seen]) -> list[str]:
    """Names of what a run and TRL's own disagree in: samples, logged values with their step, and parameters."""
    expected, rounding = own[0], ranges(own)
    assert all(other.samples == expected.samples for other in own)
    found = [] if got.samples == expected.samples else ["samples"]
    for step, (a, b) in enumerate(zip(got.logs, expected.logs, strict=True), 1):
        assert a.keys() == b.keys()
        for key in a:
            allowed = RELATIVE * abs(b[key]) + 2 * rounding[key]
            if not key.endswith(CLOCKS) and not abs(a[key] - b[key]) <= allowed:
                found.append(f"{key} of step {step}: {a[key]} for {b[key]}, allowed {allowed:.3g}")
    for key, value in expected.after.items():
        change = (value - expected.before[key]).abs().max()
        values = torch.stack([other.after[key] for other in own])
        spread = (values.amax(0) - values.amin(0)).max()
        stored = STEPS * torch.finfo(value.dtype).eps * value.abs().max()
        error, allowed = (got.after[key] - value).abs().max(), RELATIVE * change + 2 * spread + stored
        if not error <= allowed:
            found.append(f"parameter {key}: off by {error:.3g} of a change of {change:.3g}, allowed {allowed:.3g}")
    return found


def through(monkeypatch: pytest.MonkeyPatch, f: Callable[[Tensor], Tensor]) -> None:
    """Let the log-probabilities that this package gives to TRL pass through a function."""
    score, selective = FusedHead.score, LogitFunctions.selective_log_softmax

    def scored(*args: Any) -> Any:
        logp, *rest = score(*args)
        return f(logp), *rest

    @functools.wraps(selective)
    def selected(*args: Any) -> Tensor:
        return f(selective(*args))

    monkeypatch.setattr(FusedHead, "score", scored)
    monkeypatch.setattr(LogitFunctions, "selective_log_softmax", selected)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_with_its_own_head(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    through(monkeypatch, lambda logp: calls.append(logp) or logp)  # type: ignore[func-returns-value]
    got = run(name, patch)
    assert len(calls) >= 2 * STEPS  # of two microbatches
    assert differences(got, own(name)) == []
    expected = own(name)[0]
    steps = expected.logs[:-1]
    assert len(steps) == STEPS
    for key in ("loss", "grad_norm", *CASES[name].logged):
        assert any(log.get(key, 0.0) != 0 for log in steps), key
    moved = [key for key, value in expected.after.items() if not torch.equal(value, expected.before[key])]
    assert len(moved) == len(expected.after)


class _Times(torch.autograd.Function):
    """The identity, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * d_x, None


@pytest.mark.parametrize("name", CASES)
def test_wrong_gradient_would_show(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, lambda logp: _Times.apply(logp, 1.1))
    found = differences(run(name, patch), own(name))
    assert any(line.startswith("grad_norm of step 1") for line in found)
    assert any(line.startswith("parameter model.layers.0") for line in found)
    assert not any(line.startswith("loss of step 1") for line in found)


@pytest.mark.parametrize("name", CASES)
def test_slightly_wrong_gradient_would_show(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, lambda logp: _Times.apply(logp, 1.0001))
    found = differences(run(name, patch), own(name))
    assert any(line.startswith("grad_norm of step 1") for line in found)


SHOWN = {
    "grpo": "kl of step 2",
    "rloo": "kl of step 3",
    "dpo": "logps/chosen of step 1",
    "kto": "logps/rejected of step 1",
    "sft-dft": "loss of step 1",
}
"""Where it shows when log-probabilities are off."""


@pytest.mark.parametrize("name", SHOWN)
def test_slightly_wrong_log_probability_would_show(
    name: str, run: Callable[..., Seen], own: Callable[[str], list[Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(monkeypatch, lambda logp: logp + 1e-4 * logp.detach())
    assert any(line.startswith(SHOWN[name]) for line in differences(run(name, patch), own(name)))


@pytest.mark.skipif(not FUSED, reason="trl before 1.15 rounds logits before its functions see them")
@pytest.mark.parametrize("name", ["dpo", "sft-dft", "sft-softcap"])
def test_is_nearer_to_the_truth_under_autocast(name: str, run: Callable[..., Seen]) -> None:
    """TRL rounds logits to bf16, this package does not; gradients pass a model in bf16 in either case."""
    truth, own, got = (run(name, head, bf16=True) for head in (exact, nullcontext, patch))

    def off(seen: Seen) -> list[str]:
        pairs = [(key, seen.logs[0][key], value) for key, value in truth.logs[0].items() if not key.endswith(CLOCKS)]
        return [key for key, a, b in pairs if key != "grad_norm" and not abs(a - b) <= RELATIVE * abs(b)]

    assert "entropy" in off(own) or "loss" in off(own)
    assert off(got) == []
    assert error(got.change, truth.change).relative <= 2 * error(own.change, truth.change).relative
