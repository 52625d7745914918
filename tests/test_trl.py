"""TRL's trainers train alike on their own loss head and on this package's: logs, samples and parameters."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from unirl_kernels.integrations.trl import FusedHead, patch

RELATIVE, FLOOR = 1e-5, 2e-6
"""A logged value may be off by 1e-5 of itself and 2e-6: it is a sum of terms of order 1, each known to 1.2e-7, that may
cancel. An element of a parameter by 1e-5 of the largest change that training made to its tensor, and 4 roundings."""

CLOCKS = ("runtime", "per_second", "step_time", "flos")
SENTENCES = [
    "the cat sat on the mat and looked at the moon",
    "a dog ran over the hill to the old house by the sea",
    "two birds sang in the tall green tree at noon",
    "she read the book twice and gave it to her friend",
    "rain fell on the roof while the children slept",
    "he counted seven boats and one red kite",
    "bread",
    "the road to the town is long and the wind is cold tonight",
]
CHAT = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "softcap": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"final_logit_softcapping": 5.0, "head_dim": 8, "attn_implementation": "eager"},
    ),
    "scale": (transformers.CohereConfig, transformers.CohereForCausalLM, {"logit_scale": 0.25}),
}


@dataclass
class Seen:
    """What a training run logged, sampled, and made of its model's parameters."""

    logs: list[dict[str, float]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    samples: list[str] = field(default_factory=list)


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
    "max_steps": 3,
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
GRPO = partial(Case, trl.GRPOTrainer, trl.GRPOConfig, QUESTIONS)
DPO = partial(Case, trl.DPOTrainer, trl.DPOConfig, PAIRS)

CASES = {
    "grpo": GRPO({**SAMPLING, "beta": 0.04, "entropy_coef": 0.01}, logged=("kl", "entropy", "reward")),
    "grpo-without-kl": GRPO({**SAMPLING, "beta": 0.0, "loss_type": "grpo"}, logged=("entropy", "reward")),
    "rloo": Case(trl.RLOOTrainer, trl.RLOOConfig, QUESTIONS, SAMPLING, logged=("kl", "entropy", "reward")),
    "dpo": DPO(logged=("rewards/margins", "logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy")),
    "dpo-scale": DPO(family="scale", logged=("rewards/margins",)),
    "kto": Case(trl.KTOTrainer, trl.KTOConfig, VERDICTS, logged=("kl", "rewards/margins", "logits/chosen")),
    "sft": Case(trl.SFTTrainer, trl.SFTConfig, TEXTS, logged=("entropy", "mean_token_accuracy")),
    "sft-softcap": Case(trl.SFTTrainer, trl.SFTConfig, TEXTS, family="softcap", logged=("entropy",)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte pairs, so that whatever a model samples is a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    words = {"pad_token": "<pad>", "eos_token": "<eos>", "chat_template": CHAT}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **words)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """A tiny model of each family on disk, where trainers find it again for their reference model."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    words = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    folders = {}
    for name, (config, family, options) in FAMILIES.items():
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp(name)
        model = family(config(**sizes, **heads, **words, **options))
        acquaint(model, tokenizer)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def acquaint(model: Any, tokenizer: Any) -> None:
    """Let a model read the sentences a few times, until it gets some words right."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def run(folders: dict[str, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """Train a case, on TRL's own head or, ``patched``, on this package's."""
    out = tmp_path_factory.mktemp("out")

    def train(name: str, patched: bool) -> Seen:
        case = CASES[name]
        config = case.config(output_dir=str(out), **{**TRAINING, **case.options})
        family = FAMILIES[case.family][1]
        model = family.from_pretrained(folders[case.family], dtype=torch.float32)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        samples: list[str] = []
        given: dict[str, Any] = {}
        if "num_generations" in case.options:

            def vowels(completions: list[str], **_: Any) -> list[float]:
                samples.extend(completions)
                return [sum(letter in "aeiou" for letter in text) / len(text or " ") for text in completions]

            given["reward_funcs"] = vowels
        rows = datasets.Dataset.from_dict(case.rows)
        with patch() if patched else nullcontext():
            trainer = case.trainer(model, args=config, train_dataset=rows, processing_class=tokenizer, **given)
            trainer.train()
        after = {key: value.detach().clone() for key, value in model.named_parameters()}
        return Seen(trainer.state.log_history, before, after, samples)

    known: dict[str, Seen] = {}

    def train_once(name: str, patched: bool) -> Seen:
        if patched:
            return train(name, True)
        if name not in known:
            known[name] = train(name, False)
        return known[name]

    return train_once


def differences(got: Seen, expected: Seen) -> list[str]:
    """Names of what two runs disagree in: logged values, with their step, and parameters."""
    found = [] if got.samples == expected.samples else ["samples"]
    for step, (a, b) in enumerate(zip(got.logs, expected.logs, strict=True), 1):
        assert a.keys() == b.keys()
        for key in a:
            if not key.endswith(CLOCKS) and not abs(a[key] - b[key]) <= RELATIVE * abs(b[key]) + FLOOR:
                found.append(f"{key} of step {step}: {a[key]} for {b[key]}")
    for key, value in expected.after.items():
        change = (value - expected.before[key]).abs().max()
        allowed = RELATIVE * change + 4 * torch.finfo(torch.float32).eps * value.abs().max()
        error = (got.after[key] - value).abs().max()
        if not error <= allowed:
            found.append(f"parameter {key}: off by {error:.3g} of a change of {change:.3g}, allowed {allowed:.3g}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_trains_as_with_its_own_head(name: str, run: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    score = FusedHead.score
    monkeypatch.setattr(FusedHead, "score", lambda *args: calls.append(name) or score(*args))
    expected, got = run(name, False), run(name, True)
    assert len(calls) >= 6  # 3 steps of 2 microbatches
    assert differences(got, expected) == []
    steps = expected.logs[:-1]
    assert len(steps) == 3
    for key in ("loss", "grad_norm", *CASES[name].logged):
        assert any(log.get(key, 0.0) != 0 for log in steps), key
    moved = [key for key, value in expected.after.items() if not torch.equal(value, expected.before[key])]
    assert len(moved) == len(expected.after)


class _Tenth(torch.autograd.Function):
    """The identity, with a gradient that is a tenth too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Tensor:
        return 1.1 * d_x


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_wrong_gradient_would_show(name: str, run: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    score = FusedHead.score

    def wrong(*args: Any) -> Any:
        logp, *rest = score(*args)
        return _Tenth.apply(logp), *rest

    monkeypatch.setattr(FusedHead, "score", wrong)
    found = differences(run(name, True), run(name, False))
    assert any(line.startswith("grad_norm of step 1") for line in found)
    assert any(line.startswith("parameter lm_head") for line in found)
    assert not any(line.startswith("loss of step 1") for line in found)


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("reasoning_gym", reason="the demo's extras are not installed")
    path = Path(__file__).parent.parent / "examples" / "trl_grpo.py"
    spec = importlib.util.spec_from_file_location("trl_grpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_rewards_right_answers(example: ModuleType) -> None:
    asked = example.questions(3)
    sums = [sum(map(int, re.findall(r"\d+", chat[-1]["content"]))) for chat in asked["prompt"]]
    answers = [f"{sums[0]}", f"1 + 2 = {sums[1]}.\n", f"= {sums[2] + 1}"]
    chats = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert example.right(chats, number=asked["number"], prompts=asked["prompt"]) == [1.0, 1.0, 0.0]


def test_example_trains_and_compares(
    example: ModuleType, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders["llama"])
    example.main(["--model", str(folders["llama"]), "--steps", "2", "--length", "4"])
    out = capsys.readouterr().out
    assert "step 2" in out
    assert re.search(r"TRL's own head +\S+ s +\d+ MiB", out)
    scored, places = map(int, re.findall(r"(\d+) tokens of (\d+)", out)[0])
    assert 0 < scored <= 8 * 4 < places
    assert float(re.findall(r"differ by (\S+) of", out)[0]) < 1e-5
