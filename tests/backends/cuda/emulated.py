"""Rows for the emulated CUDA kernels, and what they are held to: fp64, within the budget of eager fp32.

The only Python file of these tests that knows the backend's functions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from unirl_kernels.backends import cuda
from unirl_kernels.backends.groups import ELSEWHERE, ProgramArgs, ReadoutArgs, RowGradients, RowStats
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import trace, weight_name
from unirl_kernels.testing.budgets import condition_of, violations

TOKENS = (2, 3)
"""[B, L]; the targets are the first column, ignored, no column at all; ignored, the last column, in another shard."""

IDENTITY = ReadoutArgs(1.0, None, 1.0, None)
READOUTS = {
    "plain": IDENTITY,
    "cold": ReadoutArgs(1.5, None, 0.3, None),
    "negative scale": ReadoutArgs(-0.8, None, 1.0, None),
    "softcap": ReadoutArgs(0.9, 5.0, 1.0, None),
    "negative softcap": ReadoutArgs(-0.5, 30.0, 1.3, None),
    "temperatures": ReadoutArgs(1.0, None, 9.0, torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.7, 2.5]])),
    "softcap and temperatures": ReadoutArgs(2.0, 8.0, 1.0, torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.7, 2.5]])),
}

LAYOUTS = {"contiguous": (1, 0, 0), "aligned": (16, 16, 0), "unaligned": (1, 1, 3)}
"""Logits from row to row: V, filled up to a multiple of the first number, and the second. The third is where the first
row starts. Between two batches there is room for a row, but where rows are contiguous."""


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
    fields: dict[str, Tensor]  # [B, L] each
    gradients: RowGradients  # of the statistics


@contextmanager
def emulated(module: ModuleType) -> Iterator[None]:
    """The CUDA backend runs on the CPU, by a module that the emulator's ``load`` gave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "unirl_kernels._cuda", module)
        patch.setattr(cuda, "unavailable", lambda device: None)
        cuda._native.cache_clear()
        try:
            yield
        finally:
            cuda._native.cache_clear()


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What ``torch.empty`` gives, so that a value which is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def memory(case: Case, dtype: torch.dtype, start: int = 0) -> Tensor:
    """[B, L, V] of NaN in the case's layout, and NaN around it."""
    multiple, more, first = LAYOUTS[case.layout]
    batch, length = TOKENS
    stride = -(-case.vocab // multiple) * multiple + more
    batch_stride = (length + (more > 0)) * stride
    whole = torch.full((first + start + batch * batch_stride,), torch.nan, dtype=dtype)
    return whole.as_strided((batch, length, case.vocab), (batch_stride, stride, 1), first + start)


def make_rows(case: Case) -> Rows:
    """Logits of a spread of 3; old and reference log-probabilities at a realistic distance, or on policy."""
    torch.manual_seed(case.vocab)
    logits = torch.randn(*TOKENS, case.vocab) * 3
    target = torch.tensor([[0, IGNORE, case.vocab], [IGNORE, case.vocab - 1, ELSEWHERE]])
    index = target.clamp(0, case.vocab - 1).unsqueeze(-1)
    if case.fill == "certain":
        logits.scatter_(-1, index, 40.0)
    if case.fill == "masked":
        kept = (torch.rand(logits.shape) < 0.1).scatter(-1, index, True)
        logits.masked_fill_(~kept, -torch.inf)
    logits = memory(case, case.dtype).copy_(logits)
    logp = torch.log_softmax(z_of(logits.double(), READOUTS[case.readout]), -1).gather(-1, index).squeeze(-1).float()
    fields = {weight_name(0): torch.rand(TOKENS) + 0.1, "advantage": torch.randn(TOKENS)}
    fields["ref_logp"] = logp + 0.3 * torch.randn(TOKENS)
    d_logp, d_entropy, d_lse = torch.randn(3, *TOKENS)
    if case.objective == "policy":
        return Rows(logits, target, fields, RowGradients(d_logp, None, None))
    fields["old_logp"] = logp + 0.3 * torch.randn(TOKENS)
    return Rows(logits, target, fields, RowGradients(d_logp, d_entropy, d_lse))


def run(case: Case) -> dict[str, Tensor]:
    """All that the backend makes of a case, in memory that held NaN before."""
    rows, readout = make_rows(case), READOUTS[case.readout]
    traced = trace([OBJECTIVES[case.objective]], on_policy="old_logp" not in rows.fields)
    fields = torch.stack([rows.fields[name] for name in traced.fields])
    program = ProgramArgs(traced.text, fields, torch.tensor(traced.params, dtype=torch.float64))

    def to_write() -> tuple[Tensor, Tensor]:
        """Logits, and where their gradient goes; an unaligned one is so in another way."""
        if not case.in_place:
            return rows.logits, memory(case, case.d_dtype or case.dtype, 2 if case.layout == "unaligned" else 0)
        logits = memory(case, case.dtype).copy_(rows.logits)
        return logits, logits

    with new_memory_is_nan():
        stats, moments = cuda.token_stats(rows.logits, rows.target, readout)
        logits, of_stats = to_write()
        cuda.token_stats_backward(logits, rows.target, readout, moments, rows.gradients, of_stats)
        logits, of_loss = to_write()
        out = cuda.fused_loss(logits, rows.target, readout, program, of_loss, "cluster")
    for written in (of_stats, of_loss):
        assert only_rows_written(written), "memory outside of the rows was written"
    measured = {**stats._asdict(), **moments._asdict(), "d_logits of statistics": of_stats}
    return {**measured, **{f"fused {name}": x for name, x in out._asdict().items()}, "fused d_logits": of_loss}


def stats_of(logits: Tensor, target: int) -> RowStats:
    """Statistics of logits [1, 1, V], without a readout."""
    return cuda.token_stats(logits, torch.tensor([[target]]), IDENTITY).stats


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
    """What autograd gives in ``dtype`` for the rows that are read; for a loss, for rows whose target is a column."""
    readout, fused = READOUTS[case.readout], (rows.target >= 0) & (rows.target < case.vocab)
    read = fused | (rows.target == ELSEWHERE)
    elsewhere = rows.target[read] == ELSEWHERE
    x = rows.logits.to(dtype).detach().requires_grad_()
    z = z_of(x, readout)[read]
    log_p, lse = torch.log_softmax(z, -1), z.logsumexp(-1)
    index = rows.target[read].clamp(min=0).unsqueeze(-1)
    # Beside a target that is elsewhere logp depends on this shard by its lse alone.
    logp = torch.where(elsewhere, -lse, log_p.gather(-1, index).squeeze(-1))
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    weights = [d for d in rows.gradients if d is not None]
    terms = [(s * d[read].to(dtype)).sum() for s, d in zip((logp, entropy, lse), weights, strict=False)]
    (of_stats,) = torch.autograd.grad(torch.stack(terms).sum(), x, retain_graph=True)
    stats = {"logp": logp.masked_fill(elsewhere, -torch.inf), "entropy": entropy, "lse": lse}
    u_target = z.gather(-1, index).squeeze(-1).masked_fill(elsewhere, -torch.inf) / kappa_of(readout, read, dtype)
    found = {**stats, **_moments(z, readout, read), "u_target": u_target, "d_logits of statistics": of_stats[read]}

    here = ~elsewhere
    given = {name: v[fused].to(dtype) for name, v in rows.fields.items()}
    weight = given.pop(weight_name(0))
    given.setdefault("old_logp", logp[here].detach())
    of_tokens = {"logp": logp[here], "entropy": entropy[here], "lse": lse[here]}
    loss = weight * OBJECTIVES[case.objective](_Token(**of_tokens, **given))
    (of_loss,) = torch.autograd.grad(loss.sum(), x)
    found |= {f"fused {name}": value for name, value in {"loss": loss, **of_tokens, "d_logits": of_loss[fused]}.items()}
    return {name: value.detach() for name, value in found.items()}


def kappa_of(readout: ReadoutArgs, read: Tensor, dtype: torch.dtype) -> Tensor:
    row = readout.row_temperature
    temperature = torch.full(TOKENS, readout.temperature, dtype=dtype) if row is None else row.to(dtype)
    return (abs(readout.scale) if readout.softcap is None else readout.softcap) / temperature[read]


def _moments(z: Tensor, readout: ReadoutArgs, read: Tensor) -> dict[str, Tensor]:
    top = z.amax(-1)
    below = z - top.unsqueeze(-1)
    e = below.exp()
    sz = torch.where(e == 0, 0.0, e * below).sum(-1)
    return {"top": top / kappa_of(readout, read, z.dtype), "s_minus_1": e.sum(-1) - 1, "sz": sz}


def check(case: Case, got: dict[str, Tensor]) -> None:
    """Assert that all of it is within budget, 0 in ignored rows, NaN where a target is no column."""
    rows = make_rows(case)
    fused = (rows.target >= 0) & (rows.target < case.vocab)
    truth, plain = naive(case, rows, torch.float64), naive(case, rows, torch.float32)
    lse = max(1.0, truth["lse"].abs().max().item())
    for name, exact in truth.items():
        x = got[name]
        assert not x[rows.target == IGNORE].any(), f"{name} of an ignored row is not 0"
        assert x[rows.target == case.vocab].isnan().all(), f"{name} of a row whose target is no column is not NaN"
        gradient = "d_logits" in name
        condition = 2 * lse if gradient else lse * condition_of(exact)
        # The plain gradient is rounded as it is stored, and is fp32 again, so that ulps are those of fp32.
        rounded = plain[name].to(x.dtype).float() if gradient else plain[name]
        read = fused if name.startswith("fused") else fused | (rows.target == ELSEWHERE)
        problems = violations(x[read].float(), rounded, exact, condition=condition)
        assert not problems, f"{name}: {problems}"
