"""Tiny causal language models of transformers, what they are given, and how exact a loss head on them has to be."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unirl_kernels.testing.budgets import condition_of, violations

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

B, L, V = 3, 7, 53
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},
}


def tiny(family: str = "Llama", **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    if (bias := model.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    return model


def adapted(model: Any, *targets: str) -> Any:
    """The model with LoRA adapters whose B is not zero, as after some training."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def tokens() -> dict[str, Tensor]:
    """Sequences with padding on the right and prompts that do not count."""
    ids = torch.randint(3, V, (B, L))
    mask = torch.arange(L) < torch.tensor([[7], [5], [3]])
    labels = ids.masked_fill(~mask, -100)
    labels[0, :2] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


class Float64(TorchFunctionMode):
    """Computes in float64 what transformers converts to float32, so that a float64 model gives the truth."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def double(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if function is Tensor.float:
            function = Tensor.double
        return function(*map(double, args), **{name: double(x) for name, x in (kwargs or {}).items()})


def within_budget(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    condition: Mapping[str, float] = {},
) -> None:
    """Assert that each tensor errs at most twice as much as the plain one, and a few roundings."""
    assert got.keys() == plain.keys() == truth.keys()
    problems = {}
    for name, value in got.items():
        tensors = (x.detach() for x in (value, plain[name], truth[name]))
        if found := violations(*tensors, condition=condition.get(name, 1.0)):
            problems[name] = found
    assert not problems, problems


def loss_and_gradients(model: Any, inputs: Mapping[str, Any], logits: bool = True) -> dict[str, Tensor]:
    out = model(**inputs)
    assert (out.logits is not None) == logits
    return {"loss": out.loss, **gradients(model, out.loss)}


def cancelling(exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Conditions of gradients: one may be a sum that cancels, of terms as large as the largest of them."""
    found = {name: x for name, x in exact.items() if name != "loss"}
    largest = max(x.abs().max().item() for x in found.values())
    return {name: condition_of(x, largest) for name, x in found.items()}


def own_and_exact(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own loss and gradients, and the truth of them."""
    exact = copy.deepcopy(model).double()
    own = loss_and_gradients(model, inputs)
    with Float64():
        return own, loss_and_gradients(exact, inputs)
