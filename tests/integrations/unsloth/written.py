"""Trainers that unsloth writes: ``python -m tests.integrations.unsloth.written before|after|never``.

A process of its own, which unsloth takes for one with a GPU: on a CPU it writes none. ``before`` and ``after`` say when
the patch begins, seen from the writing. Prints what was found as JSON.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["UNSLOTH_ALLOW_CPU"] = "1"

import unsloth  # noqa: F401  before what it changes

# isort: split
import torch
import unsloth_zoo.fused_losses.fused_linear as linear
from torch import Tensor
from unsloth.models import rl

from unirl_kernels.integrations import unsloth as ours

B, L, D, V = 2, 9, 16, 101
KINDS = {"grpo_trainer": "UnslothGRPOTrainer", "dpo_trainer": "UnslothDPOTrainer"}


def written() -> dict[str, Any]:
    """The modules, as unsloth makes them when it is imported on a machine with a GPU."""
    for kind in KINDS:
        rl._patch_trl_rl_trainers(kind)
    return {name: sys.modules[name] for name in KINDS.values()}


def scored(modules: dict[str, Any]) -> dict[str, list[float]]:
    """Log-probabilities and a gradient by the text that was written: of the table's entry, and of DPO's scoring."""
    torch.manual_seed(0)
    given = torch.randn(B, L, D), torch.randn(V, D), torch.randint(V, (B, L)), torch.randn(V)

    def grpo(hidden: Tensor, weight: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        by_text = modules["UnslothGRPOTrainer"].chunked_hidden_states_selective_log_softmax
        found: Tensor = by_text(hidden, weight, index, temperature=0.7, lm_head_bias=bias, logit_softcapping=5.0)
        return found

    def dpo(hidden: Tensor, weight: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        head = None, SimpleNamespace(weight=weight, bias=bias), (0.0, 0.0, 5.0)
        mask = torch.ones_like(index, dtype=torch.bool)
        text = modules["UnslothDPOTrainer"]
        found: tuple[Tensor, ...] = text._unsloth_fused_pass_logps(
            SimpleNamespace(), head, hidden, index, mask, stats=True, grad=True
        )
        return torch.stack([found[0], found[1], found[2].squeeze(-1)])

    out = {}
    for name, score in {"grpo": grpo, "dpo": dpo}.items():
        leaf = given[0].clone().requires_grad_()
        values = score(leaf, *given[1:])
        (gradient,) = torch.autograd.grad(values.square().sum(), leaf)
        out[name] = torch.cat([values.detach().flatten(), gradient.flatten()]).tolist()
    return out


def main(when: str) -> None:
    calls: list[str] = []
    score = ours.Functions.fused_linear_logprobs

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append("logp")
        return score(*args, **kwargs)

    ours.Functions.fused_linear_logprobs = noted  # type: ignore[method-assign]
    theirs = linear.fused_linear_logprobs
    if when == "before":
        ours.patch()
    modules = written()
    if when == "after":
        ours.patch()
    values = scored(modules)
    text = {name: Path(inspect.getfile(module)).read_text() for name, module in modules.items()}
    source = inspect.getsource(rl.selective_log_softmax)
    ours.unpatch()
    held = [module._unsloth_fused_linear_logprobs is theirs for module in (modules["UnslothDPOTrainer"],)]
    found = {"values": values, "calls": len(calls), "text": text, "source": source, "given_back": held}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
