"""Tensors that kept their shape when their memory was freed, as sharded training leaves parameters: an error that
names them, from every function. Reading there ends the process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk

V, D = 37, 8
ON_LOGITS = ("token_stats", "token_observations", "fused_loss", "sequence loss")
ON_HEADS = ("linear_token_stats", "linear_token_observations", "fused_linear_loss", "sequence linear loss")


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


def tensors() -> dict[str, Tensor]:
    return {
        "logits": torch.randn(2, 5, V),
        "hidden": torch.randn(2, 5, D),
        "weight": torch.randn(V, D),
        "bias": torch.randn(V),
        "target": torch.randint(0, V, (2, 5)),
        "temperature": torch.ones(2, 5),
        "advantage": torch.randn(2),
        "old_logp": -torch.rand(2, 5),
        "mine": torch.rand(2, 5),
    }


def loss_of(name: str) -> uk.Loss:
    def objective(t: Any) -> Tensor:
        value = -t.advantage * t.mine * torch.exp(t.logp - t.old_logp)
        return value if objective.scope == "token" else value * t.to_tokens(t.sequence_mean(t.logp))

    objective.scope = "sequence" if name.startswith("sequence") else "token"
    return uk.Loss(objective)


def call(name: str, x: dict[str, Tensor], plan: uk.Plan) -> Any:
    """A function on these tensors."""
    readout = uk.Readout(x["temperature"])
    if "loss" not in name:
        head = {"bias": x["bias"]} if name.startswith("linear") else {}
        operands = (x["hidden"], x["weight"]) if head else (x["logits"],)
        return getattr(uk, name)(*operands, x["target"], readout=readout, plan=plan, **head)
    batch = uk.Batch(x["target"], x["advantage"], old_logp=x["old_logp"], fields={"mine": x["mine"]})
    if "linear" in name:
        operands = x["hidden"], x["weight"]
        return uk.fused_linear_loss(*operands, batch, loss_of(name), bias=x["bias"], readout=readout, plan=plan)
    return uk.fused_loss(x["logits"], batch, loss_of(name), readout=readout, plan=plan)


def reads(name: str) -> tuple[str, ...]:
    operands = ("hidden", "weight", "bias") if name in ON_HEADS else ("logits",)
    fields = ("advantage", "old_logp", "mine") if "loss" in name else ()
    return (*operands, "target", "temperature", *fields)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("name", "what"), [(n, w) for n in ON_LOGITS + ON_HEADS for w in reads(n)])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_freed_memory(backend: str, name: str, what: str, grad: bool) -> None:
    x = tensors()
    if grad and x[what].is_floating_point() and what in ("logits", "hidden", "weight", "bias"):
        x[what].requires_grad_()
    freed(x[what])
    with pytest.raises(ValueError, match=f"{what}.* must have memory, got a tensor of shape .* whose storage is freed"):
        call(name, x, uk.Plan(backend))


@pytest.mark.parametrize("name", ON_LOGITS + ON_HEADS)
def test_without_freed_memory(name: str) -> None:
    call(name, tensors(), uk.Plan("cpu"))
