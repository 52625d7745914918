"""axolotl trains alike on its own losses and with the plugin: SFT, DPO and GRPO, full and LoRA."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("axolotl", reason="axolotl is not installed: make test-trainers")

os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}

import axolotl.cli.train as cli
import trl.trainer.utils
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.train import train as train_model
from axolotl.utils.dict import DictDefault
from transformers.loss import loss_utils

from tests.integrations.logged import Trained, wrong
from tests.integrations.trl.models import SENTENCES, save
from unirl_kernels.integrations import axolotl as ours
from unirl_kernels.testing import oracle

PLUGIN = "unirl_kernels.integrations.axolotl.FusedLossPlugin"
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_linear": True,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,  # Triton's, on a GPU
}
LOGGED = {"sft": [], "dpo": ["rewards/margins", "logps/chosen"], "grpo": ["kl", "entropy", "rewards/vowels/std"]}
MEMORY = ("allocated (GiB)", "active (GiB)", "reserved (GiB)", "per_sec_per_gpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and data for SFT, DPO and GRPO."""
    folder = tmp_path_factory.mktemp("axolotl")
    save("llama", folder / "model")
    pairs = [(" ".join(words[:3]), " ".join(words[3:]) or "and") for words in map(str.split, SENTENCES)]
    ends = [end for _, end in pairs]
    sft = [{"instruction": prompt, "input": "", "output": end} for prompt, end in pairs]
    dpo = [
        {"prompt": prompt, "chosen": end, "rejected": other}
        for (prompt, end), other in zip(pairs, ends[1:] + ends[:1], strict=True)
    ]
    grpo = [{"prompt": prompt} for prompt, _ in pairs]
    for name, rows in {"sft": sft, "dpo": dpo, "grpo": grpo}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def configuration(folder: Path, stage: str, **options: Any) -> Path:
    """A file as a user of axolotl writes it."""
    data = {"path": str(folder / f"{stage}.jsonl"), "ds_type": "json", "split": "train"}
    given: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "datasets": [{**data, "type": "alpaca" if stage == "sft" else {"field_prompt": "prompt"}}],
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "special_tokens": {"pad_token": "<pad>"},
        "sequence_len": 512,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "num_epochs": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "max_grad_norm": 1e6,
        "seed": 0,
        "bf16": False,
        "tf32": False,
        "attn_implementation": "eager",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "device": "cpu",
    }
    if stage == "dpo":
        given |= {"rl": "dpo"}
    if stage == "grpo":
        group = {"num_generations": 4, "max_completion_length": 8}
        trl = {**group, "reward_funcs": ["rewards.vowels"], "beta": 0.1, "temperature": 0.9}
        given |= {"rl": "grpo", "trl": trl, "datasets": [{**data, "type": "rewards.prompts"}]}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(given | options))
    return file


def train(file: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """A short run of ``axolotl train FILE``."""
    trainers = []

    def seen(**given: Any) -> Any:
        found = train_model(**given)
        trainers.append(found[2])
        return found

    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # axolotl looks for modules by one name
    monkeypatch.setattr(cli, "train", seen, raising=False)
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", {})  # of the run before
    torch.manual_seed(0)  # LoRA's A is drawn before the trainer sets its seed
    cli.do_train(load_cfg(str(file)), TrainerCliArgs())
    return Trained.of(trainers[0])


class Exact:
    """``LogitFunctions`` in fp64."""

    def __init__(self, plan: Any) -> None: ...

    def selective_log_softmax(self, logits: Tensor, index: Tensor) -> Tensor:
        return oracle.log_probs(logits.double(), index)

    def entropy_from_logits(self, logits: Tensor, chunk_size: int = 128) -> Tensor:
        logp = logits.double().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)


def exact_loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **rest: Any) -> Tensor:
    target = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    logp = oracle.log_probs(logits.double(), target.clamp(min=0))
    count = (target != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return -torch.where(target != -100, logp, 0).sum() / count


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_trains_as_with_its_own_losses(stage: str, lora: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LORA if lora else {}
    own = train(configuration(folder, stage, **options), monkeypatch)
    file = configuration(folder, stage, plugins=[PLUGIN], **options)
    with monkeypatch.context() as in_fp64:
        in_fp64.setattr(ours, "causal_lm_loss", exact_loss)
        in_fp64.setattr(ours, "LogitFunctions", Exact)
        true = train(file, in_fp64)
    calls: list[str] = []
    with monkeypatch.context() as noted:
        scaled(noted, 1.0, calls)
        got = train(file, noted)
    assert set(calls) >= {"loss" if stage == "sft" else "logp"}
    assert wrong(got, own, true, MEMORY) == []
    for key in ("loss", "grad_norm", *LOGGED[stage]):
        assert any(log.get(key, 0.0) != 0 for log in own.log), key

    with monkeypatch.context() as faulty:
        scaled(faulty, 1.0001, [])
        found = wrong(train(file, faulty), own, true, MEMORY)
    assert any(line.startswith("grad_norm of step 1") for line in found), found
    assert any(line.startswith("parameters") for line in found), found


def scaled(monkeypatch: pytest.MonkeyPatch, factor: float, calls: list[str]) -> None:
    """Let gradients of this package's loss and log-probabilities be multiplied by a factor, and calls be noted."""
    own_loss, own_logp = ours.causal_lm_loss, ours.LogitFunctions.selective_log_softmax

    def steeper(x: Tensor) -> Tensor:
        return x.detach() + factor * (x - x.detach())

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("loss")
        return steeper(own_loss(*args, **kwargs))

    def logp(*args: Any) -> Tensor:
        calls.append("logp")
        return steeper(own_logp(*args))

    monkeypatch.setattr(ours, "causal_lm_loss", loss)
    monkeypatch.setattr(ours.LogitFunctions, "selective_log_softmax", logp)


def test_replaces_all_and_gives_all_back() -> None:
    """TRL's functions in modules from before axolotl's patch, axolotl's, and the model's loss."""
    from axolotl.loaders.patch_manager import PatchManager
    from axolotl.monkeypatch.trainer import utils as axolotls
    from trl.trainer import dpo_trainer

    trls, loss = dpo_trainer.selective_log_softmax, loss_utils.LOSS_MAPPING["ForCausalLM"]
    manager = object.__new__(PatchManager)
    manager.cfg = DictDefault({"rl": "dpo"})
    manager._apply_trl_trainer_utils_patches()
    theirs = axolotls.selective_log_softmax
    assert trl.trainer.utils.selective_log_softmax is theirs
    plugin = ours.FusedLossPlugin()
    plugin.pre_model_load(manager.cfg)
    for module in (trl.trainer.utils, axolotls, dpo_trainer):
        assert module.selective_log_softmax.__func__ is ours.LogitFunctions.selective_log_softmax
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is ours.causal_lm_loss
    plugin.post_train_unload(manager.cfg)
    assert dpo_trainer.selective_log_softmax is trls
    assert trl.trainer.utils.selective_log_softmax is axolotls.selective_log_softmax is theirs
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is loss


@pytest.mark.parametrize("name", [*ours.OTHER_LOSSES, "trl.use_liger_loss"])
def test_other_losses_are_refused_before_the_model_is_built(name: str) -> None:
    group, _, option = name.rpartition(".")
    given = {option: True}
    before = loss_utils.LOSS_MAPPING["ForCausalLM"]
    with pytest.raises(ValueError, match=rf"^{name} must be off with FusedLossPlugin, got True: "):
        ours.FusedLossPlugin().pre_model_load(DictDefault({group: given} if group else given))
    assert loss_utils.LOSS_MAPPING["ForCausalLM"] is before
