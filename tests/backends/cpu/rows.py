"""Rows for the native CPU kernels, what they make of them, and what naive PyTorch does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels.backends import ReadoutArgs, RowFields, cpu, eager
from unirl_kernels.program import trace

if reason := cpu.unavailable(torch.device("cpu")):
    raise RuntimeError(f"the cpu backend must run here: {reason}")

IDENTITY = ReadoutArgs(1.0, None, 1.0, None)
READOUTS = {
    "identity": IDENTITY,
    "cold": ReadoutArgs(1.5, None, 0.3, None),
    "negative": ReadoutArgs(-0.8, None, 1.0, None),
    "softcap": ReadoutArgs(0.9, 5.0, 1.0, None),
    "rows": ReadoutArgs(1.0, None, 1.0, torch.tensor([[0.5, 1.0, 2.0]])),
    "softcap_rows": ReadoutArgs(-1.0, 30.0, 1.0, torch.tensor([[0.5, 1.0, 2.0]])),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEGMENT = cpu._native().SEGMENT

GRPO = trace(uk.grpo(clip=0.2, beta=0.04).objective)
PARAMS = torch.tensor(GRPO.params, dtype=torch.float64)


@contextmanager
def one_thread() -> Iterator[None]:
    """More than one where a test says so: waiting threads make small cases several times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rows_of(dtype: torch.dtype, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(1, tokens, vocab) * 3).to(dtype), torch.randint(0, vocab, (1, tokens))


def fields_of(logits: Tensor, target: Tensor) -> RowFields:
    """Both signs of advantage, old and reference log-probabilities at a realistic distance."""
    logp = eager.token_stats(logits, target, IDENTITY).logp.double()
    noise = 0.2 * torch.randn(2, *target.shape)
    advantage = torch.randn(target.shape)
    fields = (torch.rand(target.shape) + 0.1, advantage, logp + noise[0], logp + noise[1])
    return RowFields(*(x.to(row_dtype(logits.dtype)) for x in fields))


def fused(logits: Tensor, target: Tensor, fields: RowFields, d_logits: Tensor | None = None) -> list[Tensor]:
    d_logits = cpu.empty(logits.shape, logits.dtype, logits.device) if d_logits is None else d_logits
    rows = cpu.fused_loss(logits, target, fields, IDENTITY, GRPO.program.encode(), PARAMS, d_logits, "rows")
    return [*rows, d_logits]


def z_of(x: Tensor, readout: ReadoutArgs) -> Tensor:
    """The distribution's logits, in the dtype of x."""
    cap = readout.softcap
    z = x * readout.scale if cap is None else cap * torch.tanh(x * readout.scale / cap)
    row = readout.row_temperature
    return z / (readout.temperature if row is None else row.to(x.dtype).unsqueeze(-1))


def naive(x: Tensor, target: Tensor, readout: ReadoutArgs, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """Statistics and the gradient of their weighted sum, by autograd, in the dtype of x."""
    x = x.detach().requires_grad_()
    z = z_of(x, readout)
    log_p = torch.log_softmax(z, -1)
    stats = [log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)]
    value = sum((s * w.to(x.dtype)).sum() for s, w in zip(stats, weights, strict=True))
    return [s.detach() for s in stats], torch.autograd.grad(value, x)[0]
