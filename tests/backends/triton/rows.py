"""Rows for the Triton kernels, and what naive PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unirl_kernels.backends import load
from unirl_kernels.backends.groups import FusedRows, ProgramArgs, ReadoutArgs
from unirl_kernels.program import Traced, trace, weight_name
from unirl_kernels.testing.budgets import condition_of, violations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = load("triton")
PLAIN = ReadoutArgs(1.0, None, 1.0, None)
WEIGHT = weight_name(0)

Fields = dict[str, Tensor]
"""[B, L] each, by name; without old_logp: on policy."""


def clipped_with_kl(t: Any) -> Any:
    ratio = torch.exp(t.logp - t.old_logp)
    d = t.ref_logp - t.logp
    policy = -torch.minimum(ratio * t.advantage, ratio.clamp(0.8, 1.2) * t.advantage)
    return policy + 0.04 * (torch.exp(d) - d - 1)


def with_entropy(t: Any) -> Any:
    return clipped_with_kl(t) - 0.01 * t.entropy + 0.001 * t.lse * t.lse


OBJECTIVES = {"kl": clipped_with_kl, "entropy": with_entropy}


TEMPERATURES = torch.tensor([[0.5, 1.0], [1.7, 3.0]], device=DEVICE)
READOUTS = {
    "plain": PLAIN,
    "temperature": ReadoutArgs(1.0, None, 0.7, None),
    "scale": ReadoutArgs(0.0625, None, 1.0, None),
    "negative_scale": ReadoutArgs(-1.5, None, 1.0, None),
    "softcap": ReadoutArgs(1.0, 5.0, 1.0, None),
    "negative_softcap": ReadoutArgs(-0.5, 30.0, 1.3, None),
    "row_temperature": ReadoutArgs(1.0, None, 9.0, TEMPERATURES),
    "row_temperature_softcap": ReadoutArgs(2.0, 8.0, 1.0, TEMPERATURES),
}


class Tokens:
    """What an objective reads."""

    def __init__(self, **fields: Tensor) -> None:
        self.__dict__.update(fields)


def z_of(x: Tensor, readout: ReadoutArgs) -> Tensor:
    temperature = (
        readout.temperature if readout.row_temperature is None else readout.row_temperature.to(x).unsqueeze(-1)
    )
    z = x * readout.scale
    return (z if readout.softcap is None else readout.softcap * torch.tanh(z / readout.softcap)) / temperature


def naive(x: Tensor, target: Tensor, fields: Fields, readout: ReadoutArgs, objective: Any) -> tuple[Tensor, ...]:
    """loss, logp, entropy, lse and d_logits in the dtype of x; every target is a column."""
    leaf = x.detach().clone().requires_grad_()
    z = z_of(leaf, readout)
    log_p = F.log_softmax(z, -1)
    logp = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    lse = torch.logsumexp(z, -1)
    given = {name: v.to(x.dtype) for name, v in fields.items()}
    weight = given.pop(WEIGHT)
    given.setdefault("old_logp", logp.detach())
    loss = weight * objective(Tokens(logp=logp, entropy=entropy, lse=lse, **given))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), logp.detach(), entropy.detach(), lse.detach(), gradient


@dataclass(frozen=True)
class Rows:
    logits: Tensor
    target: Tensor
    fields: Fields


def make_rows(
    vocab: int, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (1, 2), spread: float = 2
) -> Rows:
    logits = (torch.randn(*shape, vocab) * spread).to(dtype)
    target = torch.randint(0, vocab, shape)
    logp = F.log_softmax(logits.double(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1).float()
    fields = {WEIGHT: torch.rand(shape) + 0.1, "advantage": torch.randn(shape)}
    fields |= {name: logp + 0.3 * torch.randn(shape) for name in ("old_logp", "ref_logp")}
    return Rows(logits.to(DEVICE), target.to(DEVICE), {name: f.to(DEVICE) for name, f in fields.items()})


def make_program(traced: Traced, fields: Fields, like: Tensor) -> ProgramArgs:
    """The program on the fields of rows, for logits like these."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    chosen = [fields[name].to(like.device, dtype) for name in traced.fields]
    params = torch.tensor(traced.params, dtype=torch.float64, device=like.device)
    stacked = torch.stack(chosen) if chosen else torch.empty(0, *like.shape[:2], dtype=dtype, device=like.device)
    return ProgramArgs(traced.text, stacked, params)


def run(
    rows: Rows, kernel: str, objective: str = "kl", readout: ReadoutArgs = PLAIN, d_logits: Tensor | None = None
) -> tuple[Tensor, ...]:
    """loss, logp, entropy, lse and d_logits by a kernel."""
    traced = trace([OBJECTIVES[objective]], on_policy="old_logp" not in rows.fields)
    program = make_program(traced, rows.fields, rows.logits)
    d_logits = BACKEND.empty(rows.logits.shape, rows.logits.dtype, rows.logits.device) if d_logits is None else d_logits
    return (*BACKEND.fused_loss(rows.logits, rows.target, readout, program, d_logits, kernel), d_logits)


RESULTS = (*FusedRows._fields, "d_logits")
"""Names of what ``run`` and ``naive`` return."""


def check(got: Tensor, plain: Tensor, truth: Tensor, what: str, condition: float = 1.0) -> None:
    """``plain`` is naive fp32 (fp64 for fp64 logits), rounded to the dtype of ``got``."""
    relative = 1.0 if what == "d_logits" else condition_of(truth)
    problems = violations(got, plain.to(got.dtype), truth, condition=condition * relative)
    assert not problems, f"{what}: {problems}"


def check_all(got: Sequence[Tensor], rows: Rows, readout: ReadoutArgs, objective: Any) -> None:
    """Hold loss, logp, entropy, lse and d_logits against fp64."""
    args = (rows.target, rows.fields, readout, objective)
    truth = naive(rows.logits.double(), *args)
    plain = naive(rows.logits.to(torch.promote_types(rows.logits.dtype, torch.float32)), *args)
    condition = max(1.0, truth[3].abs().max().item())
    for name, g, p, t in zip(RESULTS, got, plain, truth, strict=True):
        check(g, p, t, name, condition)


def check_one_pass(rows: Rows, kernel: str, objective: str = "kl", readout: ReadoutArgs = PLAIN) -> None:
    check_all(run(rows, kernel, objective, readout), rows, readout, OBJECTIVES[objective])
