"""Helpers for the tests of reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED
from unirl_kernels.testing import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
of_every_backend = pytest.mark.parametrize("runner", [p for p in RUNNERS if p.kernel == COMPOSED], ids=str)
"""Statistics are the same for every one-pass kernel."""

EPS = torch.finfo(torch.float32).eps


def statistics(logits: Tensor, target: Tensor, runner: Runner, **readout: Any) -> tuple[Tensor, uk.TokenStats]:
    """A leaf with these logits, and the statistics of its rows."""
    leaf = logits.to(runner.device).requires_grad_()
    plan = uk.Plan(runner.backend)
    return leaf, uk.token_stats(leaf, target.to(runner.device), readout=uk.Readout(**readout), plan=plan)


def one_token(logits: Tensor, runner: Runner, **fields: float | Tensor) -> tuple[Tensor, uk.Batch]:
    """[T, V] logits as T sequences of one token, whose target is column 0; a field for all or for each."""
    shape = (len(logits), 1)
    values = {name: torch.as_tensor(x).float().view(-1, 1).expand(shape).contiguous() for name, x in fields.items()}
    values["target"] = torch.zeros(shape, dtype=torch.int64)
    return logits.unsqueeze(1).to(runner.device), uk.Batch(**{name: x.to(runner.device) for name, x in values.items()})


def gradient(logits: Tensor, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan = uk.Plan(), **readout: Any) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    out = uk.fused_loss(leaf * 1, batch, loss, readout=uk.Readout(**readout), plan=plan)
    (d_logits,) = torch.autograd.grad(out.loss, leaf)
    return d_logits


def exact(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities, entropies and d logp / d logits in fp64; the target of an ignored position is column 0."""
    z = logits.double().detach()
    log_p = torch.log_softmax(z, -1)
    one_hot = torch.nn.functional.one_hot(target.clamp(min=0), z.shape[-1])
    logp = log_p.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logp, oracle.entropy(z), one_hot - log_p.exp()


def close(x: Tensor, truth: Tensor, size: float = 1.0) -> None:
    """Assert that ``x`` is within a few ulp of fp32, relative to the truth and to intermediate values of a size."""
    torch.testing.assert_close(
        x.detach().double().cpu(), truth.detach().double().cpu(), rtol=16 * EPS, atol=16 * EPS * size, equal_nan=False
    )


def head_of(
    tokens: int = 6, vocab: int = 17, width: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, D], weight [V, D], target [T]."""
    hidden, weight = torch.randn(tokens, width) / math.sqrt(width), torch.randn(vocab, width)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, vocab, (tokens,))


def packed(target: Tensor, *lengths: int, **fields: Any) -> uk.Batch:
    """A packed batch of sequences with these lengths, which default to one sequence."""
    ends = torch.tensor([0, *(lengths or (len(target),))]).cumsum(0)
    return uk.Batch(target, cu_seqlens=ends, **fields)
