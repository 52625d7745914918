"""GRPO by the trainer that unsloth writes: ``python -m tests.integrations.unsloth.written_grpo FOLDER``.

A process of its own, which unsloth takes for one with a GPU. It trains on unsloth's functions, on these kernels, on
fp64 and on gradients that are 1e-4 too large, and prints as JSON in what the second and the last are wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "ACCELERATE_USE_CPU": "true"}

import unsloth  # noqa: F401  before what it changes

# isort: split
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from unsloth.models import rl

from tests.integrations.axolotl.rewards import vowels
from tests.integrations.logged import Trained, wrong
from tests.integrations.trl.models import SENTENCES, load, save
from unirl_kernels.integrations import unsloth as ours
from unirl_kernels.testing import oracle

SCORE = ours.Functions.fused_linear_logprobs


def train(folder: Path) -> Trained:
    model, tokenizer = load("llama", folder), AutoTokenizer.from_pretrained(folder)
    kind = type(model)
    kind.for_training, kind.for_inference = (lambda self, **_: self.train()), (lambda self, **_: self.eval())
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    steps = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e6}
    rest = {"logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": 0, "beta": 0.1, "entropy_coef": 0.01}
    args = trl.GRPOConfig(
        str(folder / "out"), max_steps=3, max_completion_length=8, bf16=False, use_cpu=True, **sizes, **steps, **rest
    )
    trainer = trl.GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[vowels],
        train_dataset=Dataset.from_list([{"prompt": " ".join(text.split()[:3])} for text in SENTENCES]),
        processing_class=tokenizer,
    )
    # Else it runs under 16-bit autocast, whose rounding hides what is compared.
    trainer._autocast_enabled, trainer._autocast_dtype, trainer._autocast_force_float32 = False, None, False
    trainer.train()
    return Trained.of(trainer)


def exact(self: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **given: Any) -> Any:
    z = hidden.double() @ weight.double().t() / given["temperature"]
    logp, entropy = oracle.log_probs(z, targets), oracle.entropy(z)
    return (logp, entropy) if given.get("return_entropy") else logp


def scaled(factor: float, calls: list[str]) -> Any:
    def steeper(x: Tensor) -> Tensor:
        return x.detach() + factor * (x - x.detach())

    def score(*args: Any, **kwargs: Any) -> Any:
        calls.append("entropy" if kwargs.get("return_entropy") else "logp")
        found = SCORE(*args, **kwargs)
        return steeper(found) if isinstance(found, Tensor) else tuple(steeper(x) for x in found)

    return score


def patched(score: Any, folder: Path) -> Trained:
    ours.Functions.fused_linear_logprobs = score  # type: ignore[method-assign]
    with ours.patch():
        return train(folder)


def main(folder: Path) -> None:
    rl._patch_trl_rl_trainers("grpo_trainer")
    save("llama", folder)
    own, true = train(folder), patched(exact, folder)
    calls: list[str] = []
    got, faulty = patched(scaled(1.0, calls), folder), patched(scaled(1.0001, []), folder)
    found = {
        "trainer": trl.GRPOTrainer.__name__,
        "calls": sorted(set(calls)),
        "log": own.log,
        "wrong": wrong(got, own, true),
        "faulty": wrong(faulty, own, true),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
