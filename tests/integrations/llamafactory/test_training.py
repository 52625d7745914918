"""LLaMA-Factory trains alike on its own losses and on this package's: SFT and DPO, full and LoRA."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("llamafactory", reason="llamafactory is not installed: make test-trainers")

os.environ |= {"DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "USE_MODELSCOPE_HUB": "0"}
try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # reads sounds alone, and its wheels want a torch with CUDA
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.train import trainer_utils
from llamafactory.train.tuner import run_exp

from tests.integrations.logged import differences
from tests.integrations.trl.models import SENTENCES, save
from unirl_kernels.integrations import llamafactory
from unirl_kernels.integrations.patching import Patch, Replacement
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

Head = Callable[[], AbstractContextManager[Any]]


def halves(text: str) -> tuple[str, str]:
    words = text.split()
    return " ".join(words[: len(words) // 2]) or "the", " ".join(words[len(words) // 2 :])


@pytest.fixture(autouse=True)
def _without_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card that is written after training asks the model for what only PEFT's have."""
    workflow = importlib.import_module("llamafactory.train.dpo.workflow")
    monkeypatch.setattr(workflow, "create_modelcard_and_push", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and data for SFT and DPO."""
    folder = tmp_path_factory.mktemp("llamafactory")
    save("llama", folder / "model")
    pairs = [halves(text) for text in SENTENCES]
    sft = [{"instruction": prompt, "input": "", "output": end} for prompt, end in pairs]
    ends = [end for _, end in pairs]
    dpo = [
        {"instruction": prompt, "input": "", "chosen": end, "rejected": other}
        for (prompt, end), other in zip(pairs, ends[1:] + ends[:1], strict=True)
    ]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "sft": {"file_name": "sft.json"},
        "dpo": {"file_name": "dpo.json", "ranking": True, "columns": columns},
    }
    for name, content in {"sft": sft, "dpo": dpo, "dataset_info": info}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def train(folder: Path, stage: str, tuning: str, head: Head) -> list[dict[str, float]]:
    """What a short run logs."""
    out = folder / "out"
    given = {
        "model_name_or_path": str(folder / "model"),
        "stage": stage,
        "do_train": True,
        "finetuning_type": tuning,
        "dataset": stage,
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": 64,
        "output_dir": str(out),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e6,
        "report_to": "none",
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "preprocessing_num_workers": 1,
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
    }
    if tuning == "lora":
        given |= {"lora_rank": 4, "lora_target": "all", "lora_dropout": 0.0}
    with head():
        run_exp(given)
    return json.loads((out / "trainer_state.json").read_text())["log_history"]  # type: ignore[no-any-return]


def exact() -> Patch:
    """Its losses in fp64."""
    from transformers.loss import loss_utils

    own = trainer_utils.get_batch_logps

    def summed(logits: Tensor, labels: Tensor, **rest: Any) -> Any:
        return own(logits.double(), labels, **rest)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **rest: Any) -> Tensor:
        target = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        logp = oracle.log_probs(logits.double(), target.clamp(min=0))
        count = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return -torch.where(target != -100, logp, 0).sum() / count

    return Patch(
        [
            Replacement(trainer_utils.get_batch_logps, summed, "llamafactory"),
            Replacement(loss_utils.ForCausalLMLoss, loss, "transformers.loss.loss_utils"),
        ]
    )


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_trains_as_with_its_own_losses(stage: str, tuning: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("causal_lm_loss", "get_batch_logps"):
        monkeypatch.setattr(llamafactory, name, _noted(getattr(llamafactory, name), name, calls))
    own, true, got = (train(folder, stage, tuning, head) for head in (nullcontext, exact, llamafactory.patch))
    assert set(calls) == {"causal_lm_loss" if stage == "sft" else "get_batch_logps"}
    assert differences(got, own, true) == []
    for key in ("loss", "grad_norm", *(["rewards/margins", "logps/chosen"] if stage == "dpo" else [])):
        assert any(log.get(key, 0.0) != 0 for log in own), key

    monkeypatch.setattr(llamafactory, "token_stats", _off(llamafactory.token_stats))
    of_sft = llamafactory.causal_lm_loss
    monkeypatch.setattr(llamafactory, "causal_lm_loss", lambda *args, **kwargs: 1.0001 * of_sft(*args, **kwargs))
    wrong = train(folder, stage, tuning, llamafactory.patch)
    assert any(line.startswith("grad_norm of step 1") for line in differences(wrong, own, true))


def _noted(function: Any, name: str, calls: list[str]) -> Any:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return called


def _off(stats: Any) -> Any:
    def scaled(*args: Any) -> Any:
        found = stats(*args)
        return found._replace(logp=1.0001 * found.logp)

    return scaled


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_sums_are_its_own(alpha: float | None) -> None:
    logits, labels = 2 * torch.randn(4, 9, 31), torch.randint(31, (4, 9))
    lengths = torch.tensor([8, 3, 5, 6])
    labels[torch.arange(9) >= lengths.unsqueeze(-1) + 1] = -100
    labels[:, :2], labels[0, 4] = -100, -100
    runs = []
    for function, dtype in ((llamafactory.get_batch_logps, torch.float32), (trainer_utils.get_batch_logps, None)):
        for kind in (dtype or torch.float32, torch.float64):
            leaf = logits.to(kind).requires_grad_()
            logp, count = function(leaf, labels, ld_alpha=alpha)
            runs.append((logp.detach(), torch.autograd.grad((logp * logp).sum(), leaf)[0], count))
    (ours, _, plain, true) = runs
    assert torch.equal(ours[2], true[2])
    for got, own, exactly in zip(ours[:2], plain[:2], true[:2], strict=True):
        assert not violations(got, own, exactly, condition=condition_of(exactly, 20.0))


def test_gives_its_own_losses_back() -> None:
    from llamafactory.train.dpo import trainer
    from transformers.loss import loss_utils

    own = trainer.get_batch_logps, loss_utils.LOSS_MAPPING["ForCausalLM"]
    llamafactory.patch()
    assert trainer.get_batch_logps is llamafactory.get_batch_logps
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is llamafactory.causal_lm_loss
    llamafactory.unpatch()
    assert (trainer.get_batch_logps, loss_utils.LOSS_MAPPING["ForCausalLM"]) == own
