"""Rows for the native CPU kernels, and results of the kernels and of naive PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.backends import cpu, eager
from unirl_kernels.backends.groups import FusedRows, ProgramArgs, ReadoutArgs, RowMoments
from unirl_kernels.program import trace, weight_name

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


def grpo(t: Any) -> Any:
    """GRPO's token loss with a KL term (Shao et al. 2024, arXiv:2402.03300v3, eq. 3), and an entropy bonus."""
    ratio, distance = torch.exp(t.logp - t.old_logp), t.ref_logp - t.logp
    policy = -torch.minimum(ratio * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage)
    return policy + 0.04 * (torch.expm1(distance) - distance) - 0.01 * t.entropy


GRPO = trace([grpo])
PARAMS = torch.tensor(GRPO.params, dtype=torch.float64)


def program_of(objective: Callable[[Any], Any], weight: Tensor) -> ProgramArgs:
    """An objective that reads statistics alone."""
    traced = trace([objective])
    return ProgramArgs(traced.text, weight[None], torch.tensor(traced.params, dtype=torch.float64))


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


def fields_of(logits: Tensor, target: Tensor, readout: ReadoutArgs = IDENTITY) -> Tensor:
    """Those of ``GRPO``: both signs of advantage, old and reference log-probabilities at a realistic distance."""
    logp = eager.token_stats(logits, target, readout).stats.logp.double()
    noise = 0.2 * torch.randn(2, *target.shape)
    named = {"advantage": torch.randn(target.shape), "old_logp": logp + noise[0], "ref_logp": logp + noise[1]}
    named[weight_name(0)] = torch.rand(target.shape) + 0.1
    return torch.stack([named[name].to(row_dtype(logits.dtype)) for name in GRPO.fields])


def fused(logits: Tensor, target: Tensor, fields: Tensor, d_logits: Tensor | None = None) -> list[Tensor]:
    """loss, logp, entropy, lse and d_logits of ``GRPO``."""
    d_logits = cpu.empty(logits.shape, logits.dtype, logits.device) if d_logits is None else d_logits
    rows = cpu.fused_loss(logits, target, IDENTITY, ProgramArgs(GRPO.text, fields, PARAMS), d_logits, "rows")
    assert isinstance(rows, FusedRows)
    return [*rows, d_logits]


def rows_of_moments(moments: RowMoments, rows: slice) -> RowMoments:
    return RowMoments(*(x[:, rows].contiguous() for x in moments))


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
