"""``Trainer`` trains alike with the loss function, with a head without logits, and with the model's own loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.transformers.models import Float64, V, adapted, tiny, tokens, transformers, within_budget
from unirl_kernels.integrations.transformers import FusedHead, causal_lm_loss
from unirl_kernels.testing.budgets import condition_of

pytest.importorskip("accelerate", reason="accelerate is not installed")


class Ragged(torch.utils.data.Dataset):
    """Sequences of very different lengths and numbers of labels, so that a mean of means is another mean."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, V, ((7, 7, 3, 6, 2, 7, 4, 5)[i],), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: (0, 5, 1, 4, 0, 5, 3, 0)[i]] = -100
        return {"input_ids": ids, "labels": labels}


def padded(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch with padding on the right."""
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad([row[name] for row in rows], True, value) for name, value in fill.items()}


@dataclass(frozen=True)
class Case:
    """Options of a training, its model, and how much coarser than float32 its intermediate values are rounded."""

    options: dict[str, Any]
    make: Callable[[], Any] = tiny
    coarser: float = 1.0


CASES = {
    "plain": Case({}),
    "accumulation": Case({"gradient_accumulation_steps": 2}, lambda: tiny(tie_word_embeddings=True)),
    "softcap": Case({"gradient_accumulation_steps": 2}, lambda: tiny("Gemma2")),
    "bf16": Case({"gradient_accumulation_steps": 2, "bf16": True}, coarser=2.0**16),
    "checkpointing": Case({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    "lora": Case({"gradient_accumulation_steps": 2}, lambda: adapted(tiny(), "q_proj", "lm_head")),
    "compile": Case({"torch_compile": True, "torch_compile_backend": "eager"}),
    # Trainer takes the labels away and smooths its own loss, from logits that it must get.
    "smoothing": Case({"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}),
}


EXACT = {"torch_compile": False, "bf16": False, "gradient_checkpointing": False}
"""What the truth does without: options that change how a step is computed, not what."""


def arguments(folder: Path | str, **options: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 0.1,
            "optim": "sgd",  # changes in proportion to the gradient
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )


def trainer_of(model: Any, folder: Path | str, **options: Any) -> Any:
    given = {"train_dataset": Ragged(), "eval_dataset": Ragged(), "data_collator": padded}
    taken = {name: options.pop(name) for name in ("compute_metrics",) if name in options}
    return transformers.Trainer(model=model, args=arguments(folder, **options), **given, **taken)


def trained(model: Any, folder: Path | str, **options: Any) -> dict[str, Tensor]:
    """Each logged value over the steps, and by how much the parameters changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(model, folder, **options)
    trainer.train()
    log, dtype = trainer.state.log_history, next(iter(before.values())).dtype
    seen = {
        name: torch.tensor([entry[name] for entry in log if name in entry], dtype=dtype)
        for name in ("loss", "grad_norm", "eval_loss")
    }
    assert all(len(values) == 3 for values in seen.values())
    return {**seen, **{name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}}


@cache
def own_and_exact(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    case = CASES[name]
    own = trained(made(case), folder, **{**case.options, "torch_compile": False})
    with Float64():
        return own, trained(made(case).double(), folder, **{**case.options, **EXACT})


def made(case: Case) -> Any:
    torch.manual_seed(0)
    return case.make()


@pytest.mark.parametrize("way", ["loss function", "head"])
@pytest.mark.parametrize("name", CASES)
def test_trainer_trains_alike(name: str, way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    case, folder = CASES[name], tmp_path_factory.getbasetemp()
    own, exact = own_and_exact(name, folder)
    model = made(case)
    # A change of a parameter is known to a rounding of the parameter.
    largest = {key: p.abs().max().item() for key, p in model.named_parameters()}
    condition = {key: max(case.coarser, condition_of(exact[key], largest.get(key, 0.0))) for key in exact}
    assert all(change.any() for change in exact.values())
    if way == "loss function":
        (model.get_base_model() if name == "lora" else model).loss_function = causal_lm_loss
        got = trained(model, folder, **case.options)
    else:
        with FusedHead(model):
            got = trained(model, folder, **case.options)
            assert model(**tokens()).logits is None
    assert model(**tokens()).logits is not None
    within_budget(got, own, exact, condition)


def test_evaluation_gives_the_loss_alone(tmp_path: Path) -> None:
    """As documented: a metric of logits gets none, whatever ``prediction_loss_only`` says."""
    model, given = tiny(), []
    trainer = trainer_of(model, tmp_path, compute_metrics=lambda seen: given.append(seen) or {"seen": 1.0})
    own = trainer.evaluate()["eval_loss"]
    with FusedHead(model):
        assert trainer.evaluate()["eval_loss"] == pytest.approx(own)
        predicted = trainer.predict(Ragged())
    assert given[0].predictions.shape[-1] == V
    assert given[1].predictions == predicted.predictions == ()
    assert predicted.label_ids.shape == given[0].label_ids.shape


def test_trainer_saves_the_plain_model(tmp_path: Path) -> None:
    model = tiny()
    trainer = trainer_of(model, tmp_path, save_strategy="steps", save_steps=2)
    with FusedHead(model):
        trainer.train()
        trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        loaded = type(model).from_pretrained(folder)
        assert torch.equal(loaded(**tokens_of(model)).logits, model(**tokens_of(model)).logits)


def tokens_of(model: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(3, V, device=model.device).view(2, -1)}
