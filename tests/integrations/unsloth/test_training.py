"""unsloth trains alike on its own losses and under the patch, on a CPU: SFT, DFT and DPO, full and LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("unsloth", reason="unsloth is not installed: make test-trainers")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

from tests.integrations.logged import Trained, wrong
from tests.integrations.trl.models import SENTENCES, save
from unirl_kernels.integrations import unsloth as ours
from unirl_kernels.testing import oracle

STAGES = {
    "sft": (SFTTrainer, SFTConfig, {"loss_type": "nll"}, "chunked_linear_cross_entropy"),
    "dft": (SFTTrainer, SFTConfig, {"loss_type": "dft", "learning_rate": 0.5}, "cpu_chunked_log_probs"),
    "dpo": (DPOTrainer, DPOConfig, {}, "cpu_chunked_log_probs"),
}


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    ours.unpatch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unsloth")
    save("llama", folder / "model")
    return folder


def train(stage: str, lora: bool, folder: Path) -> Trained:
    """A short run, as a user of unsloth writes it."""
    trainer_of, config_of, options, _ = STAGES[stage]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "model"), max_seq_length=64, load_in_4bit=False, full_finetuning=not lora, dtype=torch.float32
    )
    if lora:
        model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    sizes = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 64}
    steps = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e6}
    rest = {"logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": False, "seed": 0}
    rest = {"learning_rate": 0.05, **rest, **options}
    args = config_of(output_dir=str(folder / "out"), **sizes, **steps, **rest)
    pairs = [(" ".join(words[:3]), " ".join(words[3:]) or "and") for words in map(str.split, SENTENCES)]
    if stage == "dpo":
        others = [end for _, end in pairs[1:] + pairs[:1]]
        rows = [{"prompt": a, "chosen": b, "rejected": c} for (a, b), c in zip(pairs, others, strict=True)]
    else:
        rows = [{"prompt": a, "completion": b} for a, b in pairs]
    trainer = trainer_of(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return Trained.of(trainer)


def exact_loss(
    self: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_items_in_batch: Any, **rest: Any
) -> Tensor:
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logp = oracle.log_probs(hidden.double() @ weight.double().t(), target.clamp(min=0))
    return -torch.where(target != -100, logp, 0).sum() / num_items_in_batch


def exact_head(
    self: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any, **outputs: Any
) -> tuple[Tensor, ...]:
    z = hidden.double() @ weight.double().t()
    frozen = z.detach()
    seen = (2 * frozen.log_softmax(-1)).logsumexp(-1), frozen.mean(-1), frozen.argmax(-1) == targets
    return oracle.log_probs(z, targets), oracle.entropy(z), *seen


def scaled(name: str, factor: float, calls: list[str]) -> Any:
    """One of the functions that take unsloth's place, with gradients that are multiplied by a factor."""
    own = getattr(ours.Functions, name)

    def steeper(x: Tensor) -> Tensor:
        return x.detach() + factor * (x - x.detach())

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        found = own(*args, **kwargs)
        return steeper(found) if isinstance(found, Tensor) else (steeper(found[0]), *found[1:])

    return function


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_trains_as_with_its_own_losses(stage: str, lora: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = STAGES[stage][3]

    def patched(function: Any) -> Trained:
        with monkeypatch.context() as replaced, ours.patch():
            replaced.setattr(ours.Functions, name, function)
            ours.patch()
            return train(stage, lora, folder)

    own = train(stage, lora, folder)
    true = patched(exact_loss if name == "chunked_linear_cross_entropy" else exact_head)
    calls: list[str] = []
    got = patched(scaled(name, 1.0, calls))
    assert calls
    assert wrong(got, own, true) == []
    assert own.log[0]["grad_norm"] > 0

    found = wrong(patched(scaled(name, 1.0001, [])), own, true)
    assert any(line.startswith("grad_norm of step 1") for line in found), found
    assert any(line.startswith("parameters") for line in found), found
