"""Short training runs of TRL's trainers, and in what two runs differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import trl

from tests.integrations.trl.heads import FUSED
from tests.integrations.trl.models import SENTENCES, byte_pairs, load, save

RELATIVE = 1e-5
"""What a logged value may be off by, relative to itself, and a parameter, relative to the change that training made.

Beyond that, since terms may cancel, twice what rounding does: the range of TRL's own values over the run as it is and
``ORDERS`` runs whose head takes the vocabulary and features in other orders; and for a parameter the rounding of each
step.
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

    def with_options(self, options: dict[str, Any]) -> Case:
        return replace(self, options={**self.options, **options}, logged=())


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
BONUS = {"entropy_coef": 0.01} if "entropy_coef" in trl.GRPOConfig.__dataclass_fields__ else {}  # not in older releases
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
PATCHED = list(CASES)
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 3.0, "entropy_coef_delta": 0.01, "entropy_coef": 0.02}
CASES |= {
    "grpo-cispo": GRPO({**SAMPLING, "loss_type": "cispo", "epsilon_high": 1.05}, logged=("cispo_clip_ratio",)),
    "grpo-vespo": GRPO({**SAMPLING, "loss_type": "vespo"}, logged=("vespo/phi_seq_mean",)),
    "grpo-adaptive": GRPO({**SAMPLING, **ADAPTIVE, "loss_type": "sapo"}, logged=("entropy_coef", "policy_loss")),
    "grpo-off-policy": GRPO({**SAMPLING, "off_policy_mask_threshold": 0.5, "delta": 1.5, "epsilon": 0.01}),
    "grpo-softcap": GRPO({**SAMPLING, "beta": 0.04}, family="softcap", logged=("kl",)),
    "grpo-short-window": GRPO({**SAMPLING, "gradient_accumulation_steps": 3, "steps_per_generation": 2}),
}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "ld_alpha": 0.5}
CASES |= {
    "rloo-clipped": CASES["rloo"].with_options({"epsilon": 0.02, "epsilon_high": 0.03}),
    "dpo-mpo": DPO(MPO, logged=("rewards/margins", "logps/chosen", "logits/rejected")),
    "dpo-sorted": DPO({"loss_type": ["aot"], "label_smoothing": 0.1}, logged=("rewards/margins",)),
    "dpo-precomputed": DPO({"precompute_ref_log_probs": True}, logged=("rewards/margins",)),
    "kto-apo": CASES["kto"].with_options({"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}),
}
FUSABLE = [name for name in CASES if name != "dpo-weighted"]
"""Of which ``fuse`` makes loss and gradient in one pass."""


Head = Callable[[], AbstractContextManager[Any]]


def saved(family: str, folder: Path) -> Path:
    """The folder, with a tiny model in it."""
    save(family, folder)
    return folder


def train(case: Case, folder: Path, out: Path, head: Head, prepare: Callable[[Any], object], **options: Any) -> Seen:
    """Train a case.

    Args:
        case: the case.
        folder: of the model.
        out: where the trainer may write.
        head: a context that puts a head in the place of TRL's own.
        prepare: is called with the trainer before it trains.
        options: of the configuration, besides those of the case; ``peft_config`` is the trainer's.
    """
    given = {name: options.pop(name) for name in ("peft_config",) if name in options}
    config = case.config(output_dir=str(out), **{**TRAINING, **case.options, **options})
    model = load(case.family, folder)
    samples: list[str] = []
    if "num_generations" in case.options:

        def vowels(completions: list[str], **_: Any) -> list[float]:
            samples.extend(completions)
            return [sum(letter in "aeiou" for letter in text) / len(text or " ") for text in completions]

        given["reward_funcs"] = vowels
    rows = datasets.Dataset.from_dict(case.rows)
    torch.manual_seed(0)  # adapters are made at random
    with head():
        trainer = case.trainer(model, args=config, train_dataset=rows, processing_class=byte_pairs(), **given)
        before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
        prepare(trainer)
        trainer.train()
    after = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    return Seen(trainer.state.log_history, before, after, samples)


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
