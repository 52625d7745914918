"""The eager backend: plain torch operations, on any device. Slow and short; it defines what the others compute."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends.groups import (
    ELSEWHERE,
    FusedRows,
    Measured,
    Observed,
    ProgramArgs,
    ReadoutArgs,
    RowGradients,
    RowMoments,
    RowObservations,
    RowStats,
    row_dtype,
)
from unirl_kernels.backends.moments import kappa_of, statistics
from unirl_kernels.backends.torch_defaults import empty as empty
from unirl_kernels.backends.torch_defaults import matmuls as matmuls
from unirl_kernels.backends.torch_defaults import release_memory as release_memory
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import evaluate, parsed

KERNELS = ("rows",)


def unavailable(device: torch.device) -> str | None:
    return None


def kernels_by_vocab(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return ((KERNELS[0], sys.maxsize),)


class Mapped(NamedTuple):
    """Rows of logits after the readout: z = kappa u."""

    u: Tensor  # [B, L, V] fp32, fp64 for fp64 logits
    kappa: Tensor  # [B, L] or []
    slope: Tensor  # dz/dx, broadcasts to [B, L, V]


def _mapped(logits: Tensor, readout: ReadoutArgs) -> Mapped:
    x = logits.to(row_dtype(logits.dtype))
    row = readout.row_temperature
    temperature = x.new_tensor(readout.temperature) if row is None else row.to(x.dtype)
    if readout.softcap is not None:
        u = torch.tanh(x * (readout.scale / readout.softcap))
        slope = readout.scale / temperature.unsqueeze(-1) * (1 - u * u)
        return Mapped(u, kappa_of(readout, x), slope)
    u = -x if readout.scale < 0 else x
    return Mapped(u, kappa_of(readout, x), readout.scale / temperature.unsqueeze(-1))


def _masked(value: Tensor, target: Tensor, vocab: int) -> Tensor:
    """0 in ignored rows, NaN in rows whose target is not in the vocabulary."""
    known = ((target >= 0) & (target < vocab)) | (target == ELSEWHERE)
    value = torch.where(known, value, torch.nan)
    return torch.where(target == IGNORE, 0, value)


def _of_target(values: Tensor, target: Tensor) -> Tensor:
    of_target = values.gather(-1, target.clamp(0, values.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return torch.where(target == ELSEWHERE, -torch.inf, of_target)


def _below(u: Tensor, top: Tensor, kappa: Tensor) -> Tensor:
    """kappa (u_j - top), <= 0; NaN in a row with an infinite logit, which has no distribution."""
    finite = torch.where(top == -torch.inf, 0, top)
    return (u - finite.unsqueeze(-1)) * kappa.unsqueeze(-1)


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Measured:
    u, kappa, _ = _mapped(logits, readout)
    top = u.amax(-1)
    below = _below(u, top, kappa)
    e = torch.exp(below)
    sz = torch.where(e == 0, 0, e * below).sum(-1)
    vocab = logits.shape[-1]
    moments = RowMoments(*(_masked(x, target, vocab) for x in (top, e.sum(-1) - 1, sz, _of_target(u, target))))
    stats = RowStats(*(_masked(x, target, vocab) for x in statistics(moments, kappa)))
    return Measured(stats, moments)


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> Observed:
    measured = token_stats(logits, target, readout)
    u, kappa, _ = _mapped(logits, readout)
    vocab = logits.shape[-1]
    e = torch.exp(_below(u, u.amax(-1), kappa))
    s = e.sum(-1)
    log_sum_sq_probs = (torch.log((e * e).sum(-1)) - 2 * torch.log(s)).clamp(max=0)
    signed = -logits if readout.scale < 0 else logits
    largest = torch.where(s.isnan(), torch.nan, signed.amax(-1).to(u.dtype))
    mean = u.mean(-1) * kappa
    values = (_masked(x, target, vocab) for x in (log_sum_sq_probs, mean, largest))
    known = (((target >= 0) & (target < vocab)) | (target == ELSEWHERE)) & ~s.isnan()
    argmax = torch.where(known, signed.argmax(-1), -1)
    return Observed(*measured, RowObservations._make((*values, argmax)))


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    moments: RowMoments,
    gradients: RowGradients,
    d_logits: Tensor,
) -> None:
    u, kappa, slope = _mapped(logits, readout)
    stats = statistics(moments, kappa)
    zero = torch.zeros_like(moments.top)
    d_logp, d_entropy, d_lse = (zero if g is None else g.to(zero.dtype) for g in gradients)
    log_p = _below(u, moments.top, kappa) - torch.log1p(moments.s_minus_1).unsqueeze(-1)
    p = log_p.exp()
    d_z = p * (d_lse - d_logp).unsqueeze(-1)
    if gradients.d_entropy is not None:
        surprise = log_p + stats.entropy.unsqueeze(-1)
        d_z -= torch.where(p == 0, p, p * surprise) * d_entropy.unsqueeze(-1)
    # As a difference of two rounded terms, d_logp (1 - p_y) would cancel for p_y close to 1.
    p_y = stats.logp.exp()
    at_target = -d_logp * torch.expm1(stats.logp) + d_lse * p_y
    at_target -= d_entropy * torch.where(p_y == 0, p_y, p_y * (stats.logp + stats.entropy))
    column = target.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    here = (target != ELSEWHERE).unsqueeze(-1)
    d_z.scatter_(-1, column, torch.where(here, at_target.unsqueeze(-1), d_z.gather(-1, column)))
    d_logits.copy_(_masked(d_z * slope, target.unsqueeze(-1), logits.shape[-1]))


def fused_loss(
    logits: Tensor,
    target: Tensor,
    readout: ReadoutArgs,
    program: ProgramArgs,
    d_logits: Tensor,
    kernel: str,
) -> FusedRows:
    stats, moments = token_stats(logits, target, readout)
    outputs = evaluate(parsed(program.text), stats, program.fields, program.params)
    loss, *gradients = (torch.where(target == IGNORE, 0, x) for x in outputs)
    token_stats_backward(logits, target, readout, moments, RowGradients(*gradients), d_logits)
    return FusedRows(loss, *stats)


def scale_(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)
