"""Rows for the emulated CUDA kernels, and what they are held to: fp64, within the budget of eager fp32.

The only Python file of these tests that knows the backend's functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unirl_kernels.accuracy import condition_of, violations
from unirl_kernels.backends import ReadoutArgs, RowFields, RowGradients, cuda, native
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import trace

TOKENS = (1, 4)
"""[B, L]; the target of the second is ignored, that of the third is no position of the vocabulary."""

IDENTITY = ReadoutArgs(1.0, None, 1.0, None)
READOUTS = {
    "plain": IDENTITY,
    "cold": ReadoutArgs(1.5, None, 0.3, None),
    "negative scale": ReadoutArgs(-0.8, None, 1.0, None),
    "softcap": ReadoutArgs(0.9, 5.0, 1.0, None),
    "negative softcap": ReadoutArgs(-0.5, 30.0, 1.3, None),
    "temperatures": ReadoutArgs(1.0, None, 9.0, torch.tensor([[0.5, 1.0, 1.5, 2.0]])),
    "softcap and temperatures": ReadoutArgs(2.0, 8.0, 1.0, torch.tensor([[0.5, 1.0, 1.5, 2.0]])),
}

LAYOUTS = {"contiguous": (1, 0, 0), "aligned": (16, 16, 0), "unaligned": (1, 1, 3)}
"""Rows are V logits, filled up to a multiple of the first number, and the second number; the third is where the first
row starts."""


def policy(t: Any) -> Any:
    ratio = torch.exp(t.logp - t.old_logp)
    d = t.ref_logp - t.logp
    surrogate = -torch.minimum(ratio * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage)
    return surrogate + 0.04 * (torch.exp(d) - d - 1)


def with_entropy(t: Any) -> Any:
    return policy(t) - 0.01 * t.entropy + 0.001 * t.lse * t.lse


OBJECTIVES = {"policy": policy, "entropy": with_entropy}


@dataclass(frozen=True)
class Case:
    """What the kernels get."""

    vocab: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    readout: str = "plain"
    objective: str = "entropy"
    fill: str = "spread"  # "masked": -inf but for a tenth; "certain": the target's probability is nearly 1
    d_dtype: torch.dtype | None = None  # of the gradient; None: that of the logits
    in_place: bool = False

    def __str__(self) -> str:
        parts = (str(self.vocab), str(self.dtype)[6:], self.layout, self.readout, self.fill)
        kind = "in_place" if self.in_place else "" if self.d_dtype is None else f"d_{str(self.d_dtype)[6:]}"
        defaults = ("contiguous", "plain", "spread", "")
        return "-".join(part.replace(" ", "_") for part in (*parts, kind) if part not in defaults)


@dataclass(frozen=True)
class Rows:
    logits: Tensor  # [B, L, V]
    target: Tensor  # [B, L]
    fields: RowFields
    gradients: RowGradients  # of the statistics


@contextmanager
def emulated(module: ModuleType) -> Iterator[None]:
    """The CUDA backend runs on the CPU, by a module that the emulator's ``load`` gave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.extension(), "cuda", module.cuda, raising=False)
        patch.setattr(cuda, "unavailable", lambda device: None)
        cuda._native.cache_clear()
        yield
    cuda._native.cache_clear()


def memory(case: Case, dtype: torch.dtype, start: int = 0) -> Tensor:
    """[B, L, V] of NaN in the case's layout, and NaN around it."""
    multiple, more, first = LAYOUTS[case.layout]
    batch, length = TOKENS
    stride = -(-case.vocab // multiple) * multiple + more
    first += start
    whole = torch.full((first + batch * length * stride,), torch.nan, dtype=dtype)
    return whole.as_strided((batch, length, case.vocab), (length * stride, stride, 1), first)


def make_rows(case: Case) -> Rows:
    """Targets in the first and in the last column; old and reference log-probabilities at a realistic distance."""
    torch.manual_seed(case.vocab)
    logits, target = torch.randn(*TOKENS, case.vocab) * 3, torch.tensor([[0, IGNORE, case.vocab, case.vocab - 1]])
    index = target.clamp(0, case.vocab - 1).unsqueeze(-1)
    if case.fill == "certain":
        logits.scatter_(-1, index, 40.0)
    if case.fill == "masked":
        kept = (torch.rand(logits.shape) < 0.1).scatter(-1, index, True)
        logits.masked_fill_(~kept, -torch.inf)
    logits = memory(case, case.dtype).copy_(logits)
    logp = torch.log_softmax(z_of(logits.double(), READOUTS[case.readout]), -1).gather(-1, index).squeeze(-1).float()
    noise = 0.3 * torch.randn(2, *TOKENS)
    with_entropy = case.objective == "entropy"
    fields = RowFields(
        torch.rand(TOKENS) + 0.1, torch.randn(TOKENS), logp + noise[0] if with_entropy else None, logp + noise[1]
    )
    d_logp, d_entropy, d_lse = torch.randn(3, *TOKENS)
    gradients = RowGradients(d_logp, d_entropy, d_lse) if with_entropy else RowGradients(d_logp, None, None)
    return Rows(logits, target, fields, gradients)


def run(case: Case) -> dict[str, Tensor]:
    """All that the backend makes of a case, in memory that held NaN before."""
    rows, readout, traced = make_rows(case), READOUTS[case.readout], trace(OBJECTIVES[case.objective])
    params = torch.tensor(traced.params, dtype=torch.float64)

    def to_write() -> tuple[Tensor, Tensor]:
        """Logits, and where their gradient goes; an unaligned one is so in another way."""
        if not case.in_place:
            return rows.logits, memory(case, case.d_dtype or case.dtype, 2 if case.layout == "unaligned" else 0)
        logits = memory(case, case.dtype).copy_(rows.logits)
        return logits, logits

    stats = cuda.token_stats(rows.logits, rows.target, readout)
    logits, of_stats = to_write()
    cuda.token_stats_backward(logits, rows.target, stats, rows.gradients, readout, of_stats)
    logits, of_loss = to_write()
    out = cuda.fused_loss(
        logits, rows.target, rows.fields, readout, traced.program.encode(), params, of_loss, "cluster"
    )
    for written in (of_stats, of_loss):
        assert only_rows_written(written), "memory outside of the rows was written"
    return {**stats._asdict(), "d_logits of the statistics": of_stats, **_named("fused ", out), "d_logits": of_loss}


def _named(prefix: str, rows: Any) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in rows._asdict().items()}


def only_rows_written(x: Tensor) -> bool:
    whole = x._base
    assert whole is not None
    around = torch.ones_like(whole, dtype=torch.bool)
    around.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    return bool(whole[around].isnan().all())


class _Token:
    """What an objective reads."""

    def __init__(self, **fields: Tensor) -> None:
        self.__dict__.update(fields)


def z_of(x: Tensor, readout: ReadoutArgs) -> Tensor:
    """The distribution's logits, in the dtype of x."""
    z = x * readout.scale
    if readout.softcap is not None:
        z = readout.softcap * torch.tanh(z / readout.softcap)
    row = readout.row_temperature
    return z / (readout.temperature if row is None else row.to(x.dtype).unsqueeze(-1))


def naive(case: Case, rows: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by autograd in ``dtype``, of the rows that have a target."""
    used = (rows.target >= 0) & (rows.target < case.vocab)
    x = rows.logits.to(dtype).detach().requires_grad_()
    z = z_of(x, READOUTS[case.readout])[used]
    log_p = torch.log_softmax(z, -1)
    logp = log_p.gather(-1, rows.target[used].unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    stats = {"logp": logp, "entropy": entropy, "lse": z.logsumexp(-1)}
    weights = [d for d in rows.gradients if d is not None]
    terms = [(s * d[used].to(dtype)).sum() for s, d in zip(stats.values(), weights, strict=False)]
    (of_stats,) = torch.autograd.grad(torch.stack(terms).sum(), x, retain_graph=True)
    given = {name: v[used].to(dtype) for name, v in rows.fields._asdict().items() if v is not None}
    weight = given.pop("weight")
    given.setdefault("old_logp", logp.detach())
    loss = weight * OBJECTIVES[case.objective](_Token(**stats, **given))
    (of_loss,) = torch.autograd.grad(loss.sum(), x)
    fused = {"fused loss": loss, "fused logp": logp, "fused entropy": entropy}
    found = {**stats, "d_logits of the statistics": of_stats[used], **fused, "d_logits": of_loss[used]}
    return {name: value.detach() for name, value in found.items()}


def check(case: Case, got: dict[str, Tensor]) -> None:
    """Assert that all of it is within budget, 0 in ignored rows, NaN where a target is none."""
    rows = make_rows(case)
    used = (rows.target >= 0) & (rows.target < case.vocab)
    truth, plain = naive(case, rows, torch.float64), naive(case, rows, torch.float32)
    lse = max(1.0, truth["lse"].abs().max().item())
    for name, exact in truth.items():
        x = got[name]
        assert not x[rows.target == IGNORE].any(), f"{name} of an ignored row is not 0"
        assert x[rows.target == case.vocab].isnan().all(), f"{name} of a row whose target is none is not NaN"
        gradient = name.startswith("d_logits")
        condition = 2 * lse if gradient else lse * condition_of(exact)
        # The plain gradient is rounded as it is stored, and is fp32 again, so that ulps are those of fp32.
        rounded = plain[name].to(x.dtype).float() if gradient else plain[name]
        problems = violations(x[used].float(), rounded, exact, condition=condition)
        assert not problems, f"{name}: {problems}"
