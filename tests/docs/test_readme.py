"""README's Python blocks run as pasted. The files, commands and options that it names exist."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks import __main__ as benchmarks
from benchmarks.record import OK, Record
from examples.demo import __main__ as demo
from tests import ROOT
from unirl_kernels.commands import cli
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> dict[str, str]:
    """The fenced blocks of each section, one after the other."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", README, flags=re.MULTILINE)[1:]:
        fences = re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
        if fences:
            found[section.split("\n")[0]] = "\n".join(fences)
    return found


PYTHON = blocks("python")


def run(section: str, **given: Any) -> dict[str, Any]:
    """Run the blocks of a section with the variables ``given``; returns all variables."""
    exec(compile(PYTHON[section], f"README.md: {section}", "exec"), given)
    return given


def quick_start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """In a new process, with only the block's own imports."""
    command = [sys.executable, "-c", PYTHON["Quick start"]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def in_trl(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """After the block a trainer of TRL calls this package, and after ``unpatch`` it does not."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from unirl_kernels.integrations import trl as ours

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]]})
    calls: list[str] = []
    for name in ("linear_token_stats", "linear_token_observations"):
        own = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *a, own=own, **k: calls.append(own.__name__) or own(*a, **k))

    def train() -> int:
        from tests.integrations.transformers.models import tiny

        calls.clear()
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
        args = trl.SFTConfig(str(folder), max_steps=1, **quiet)
        trl.SFTTrainer(tiny(), args, train_dataset=rows, processing_class=tokenizer).train()
        return len(calls)

    try:
        names = run("Use it in TRL")
        assert train() > 0
    finally:
        ours.unpatch()
    assert names["trl"] is ours
    assert train() == 0


def in_transformers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The block trains without logits. Afterwards the model has its own forward again, and the loss function."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.integrations.transformers.models import tiny
    from tests.integrations.transformers.test_trainer import Ragged, arguments
    from unirl_kernels.integrations.transformers import causal_lm_loss

    model, outputs = tiny(), []
    model.register_forward_hook(lambda *seen: outputs.append(seen[-1]))
    before = model.lm_head.weight.detach().clone()
    args = arguments(folder, per_device_train_batch_size=1, eval_strategy="no")
    run("Use it in transformers", model=model, args=args, dataset=Ragged())
    trained = [out for out in outputs if out.logits is None]
    assert len(trained) == args.max_steps
    assert all(out.loss.isfinite() for out in trained)
    assert not torch.equal(model.lm_head.weight, before)
    assert model.loss_function is causal_lm_loss
    assert "forward" not in vars(model)


def in_a_loop(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The block's loss is that of the oracle on the model's logits, and the block makes a step."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from copy import deepcopy

    from tests.integrations.transformers.models import Float64, tiny, tokens

    model, inputs = tiny(), tokens()
    before = model.lm_head.weight.detach().clone()
    given = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "completion_mask": (inputs["labels"] >= 0).long(),
        "advantage": torch.tensor([1.0, -1.0, 0.5]),
        "old_logp": -4 + torch.rand(inputs["labels"].shape),
        "ref_logp": -4 + torch.rand(inputs["labels"].shape),
    }
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    plain, exact = model(**asked).logits.detach(), deepcopy(model).double()
    with Float64():
        truth = exact(**asked).logits.detach()
    names = run("Use it in your own loop", **given)
    target = uk.shift_targets(inputs["input_ids"], given["completion_mask"])
    batch = uk.Batch(target, given["advantage"], given["old_logp"], given["ref_logp"])

    def loss(logits: Tensor) -> Tensor:
        return oracle.loss("grpo", logits, batch, clip=0.2, beta=0.04).reshape(1)

    wanted = loss(truth)
    # The loss is made of log-probabilities, those of differences between numbers as large as lse.
    condition = condition_of(wanted, truth.logsumexp(-1).abs().max().item())
    assert not violations(names["out"].loss.detach().reshape(1), loss(plain), wanted, condition=condition)
    assert not torch.equal(model.lm_head.weight, before)


def speed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The provider is right, by the command that stands above it."""
    monkeypatch.chdir(folder)
    (folder / "my_kernel.py").write_text(PYTHON["Speed"])
    quoted = next(words for words in COMMANDS.values() if "--provider" in words)
    small = ["--device", "cpu", "--tokens", "64", "--vocab", "101", "--rounds", "2", "--no-memory", "--peers", "none"]
    assert benchmarks.main([*quoted[3:], *small, "--kernels", "none", "--out", "out.json"]) == 0
    ((row,),) = (run.rows for run in Record.load(folder / "out.json").runs)
    assert (row.key, row.status) == ("my_kernel.py my_sft", OK)


def published(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Its sum is that of plain PyTorch."""
    names = run("Published objectives")
    logits, batch = names["logits"], names["batch"]
    logp, entropy = oracle.log_probs(logits.double(), batch.target), oracle.entropy(logits.double())
    ratio = (logp - batch.old_logp).exp()
    a = batch.advantage.double()[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * math.exp(-0.05)
    d = batch.ref_logp - logp
    expected = (-surrogate + 0.04 * (d.exp() - d - 1) - 0.01 * entropy).mean()
    torch.testing.assert_close(names["out"].loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert logits.grad.any()


SECTIONS: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "Quick start": quick_start,
    "Published objectives": published,
    "Use it in TRL": in_trl,
    "Use it in transformers": in_transformers,
    "Use it in your own loop": in_a_loop,
    "Speed": speed,
}
ELSEWHERE = {"Use it in verl"}  # tests/integrations/verl: its lines are a module that verl's workers import


@pytest.mark.parametrize("section", SECTIONS)
def test_python_blocks_run_as_pasted(section: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    SECTIONS[section](monkeypatch, tmp_path)


def test_every_python_block_is_run() -> None:
    assert PYTHON.keys() == SECTIONS.keys() | ELSEWHERE
    assert set(re.findall(r"^ *[`~]{3,}(\S+)", README, flags=re.MULTILINE)) <= {"python", "sh"}
    assert "```" not in README.split("\n## ")[0]


def commands() -> list[list[str]]:
    """Words of every command in a shell block, and of those that the text quotes."""
    lines = "\n".join(blocks("sh").values()).splitlines()
    quoted = re.findall(r"`((?:make|pip|python) [^`]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))
    words = [shlex.split(line, comments=True) for line in [*lines, *quoted]]
    return [command for command in words if command]


PROGRAMS = {"unirl_kernels": cli.main, "benchmarks": benchmarks.main, "examples.demo": demo.main}
COMMANDS = {" ".join(command): command for command in commands()}


def test_commands_are_of_a_known_kind() -> None:
    assert {command[0] for command in COMMANDS.values()} == {"make", "pip", "python"}
    modules = {command[2] for command in COMMANDS.values() if command[:2] == ["python", "-m"]}
    assert modules == {*PROGRAMS, "pytest"}
    assert all(command[1] == "-m" for command in COMMANDS.values() if command[0] == "python")


def test_tests_that_are_named_exist() -> None:
    named = [command for command in COMMANDS.values() if "pytest" in command]
    assert named
    for *options, path in named:
        assert (ROOT / path).exists(), path
        assert options[3:] in ([], ["-m", "slow"])


@pytest.mark.parametrize("command", [name for name, words in COMMANDS.items() if words[0] == "make"])
def test_make_knows_its_targets(command: str) -> None:
    if which("make") is None:
        pytest.skip("make is not installed")
    assert subprocess.run([*COMMANDS[command], "-n"], cwd=ROOT, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("command", [name for name, words in COMMANDS.items() if PROGRAMS.keys() & set(words)])
def test_options_of_the_command_line_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = COMMANDS[command][2:]
    module = cli.COMMANDS[arguments[0]] if program == "unirl_kernels" else f"{program}.options"
    monkeypatch.setattr(importlib.import_module(module), "run", lambda options: 0)
    assert PROGRAMS[program](arguments) == 0


def test_extras_exist() -> None:
    extras = {extra for name in COMMANDS if name.startswith("pip") for extra in re.findall(r"\.\[(\w+)\]", name)}
    defined = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    assert extras
    assert extras <= defined


def test_files_that_are_named_exist() -> None:
    named = set(
        re.findall(r"[`(]((?:(?:examples|tests|unirl_kernels|benchmarks|csrc)/)?[\w/]+\.(?:py|md))[`)]", README)
    )
    assert {"DESIGN.md", "examples/grpo_loop.py"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []
