"""Compares a fused loss and its gradient with the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.cases import LossCase
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations


@dataclass(frozen=True)
class Result:
    loss: Tensor
    d_logits: Tensor


def fused(logits: Tensor, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan, readout: uk.Readout = uk.Readout()) -> Result:
    """Loss and gradient by the package. The logits are the result of a computation, as in a model, not leaves."""
    leaf = logits.detach().requires_grad_()
    computed = leaf.view_as(leaf) if not plan.overwrite_logits else _computed(leaf)
    out = uk.fused_loss(computed, batch, loss, readout=readout, plan=plan)
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    return Result(out.loss.detach(), d_logits)


def _computed(leaf: Tensor) -> Tensor:
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


def naive(logits: Tensor, batch: uk.Batch, loss: LossCase) -> Result:
    """Loss and gradient by the oracle, in the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    value = oracle.loss(loss.algorithm, leaf, batch, **loss.hyper)
    if not value.requires_grad:  # no token at all
        return Result(value, torch.zeros_like(leaf))
    return Result(value.detach(), torch.autograd.grad(value, leaf)[0])


def as_stored(d_logits: Tensor, dtype: torch.dtype, interpreted: bool) -> Tensor:
    """The plain gradient rounded to the logits' dtype, in fp32 so that a budget's ulps are those of fp32.

    Triton's interpreter cuts bits off instead of rounding; there the ulps of the dtype have to pass.
    """
    return d_logits.to(dtype) if interpreted else d_logits.to(dtype).float()


def check(got: Result, logits: Tensor, batch: uk.Batch, loss: LossCase, interpreted: bool = False) -> None:
    """Assert that loss and gradient are within budget.

    Plain PyTorch gets the logits in fp32 and its gradient is rounded to their dtype: in bf16 it would be so wrong
    that twice its error says nothing.
    """
    truth = naive(logits.double(), batch, loss)
    plain = naive(logits.float(), batch, loss)
    lse = torch.logsumexp(logits.double(), -1).abs().max().item() if logits.numel() else 1.0
    condition = max(lse, 1.0) * condition_of(truth.loss)
    problems = violations(got.loss.view(1), plain.loss.view(1), truth.loss.view(1), condition=condition)
    assert not problems, f"loss {got.loss.item()} against {truth.loss.item()}: {problems}"
    assert got.d_logits.dtype == logits.dtype
    rounded = as_stored(plain.d_logits, logits.dtype, interpreted)
    problems = violations(got.d_logits, rounded, truth.d_logits, condition=max(lse, 1.0))
    assert not problems, f"gradient: {problems}"
    ignored = got.d_logits[batch.target == uk.IGNORE]
    assert bool((ignored == 0).all()), "an ignored row has a gradient"
