"""The eager backend: plain torch operations, any device. Slow, short, and the meaning of the other backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unirl_kernels.backends import FusedRows, ReadoutArgs, RowFields, RowGradients, RowObservations, RowStats
from unirl_kernels.backends.plain import empty as empty
from unirl_kernels.backends.plain import products as products
from unirl_kernels.backends.plain import release_memory as release_memory
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import Program, evaluate

KERNELS = ("rows",)


def unavailable(device: torch.device) -> str | None:
    return None


def _readout(logits: Tensor, readout: ReadoutArgs) -> tuple[Tensor, Tensor]:
    """z = [B, L, V] and dz/dx, in fp32 (fp64 for fp64 logits)."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    row = readout.row_temperature
    factor = 1 / row.to(x.dtype).unsqueeze(-1) if row is not None else x.new_tensor(1 / readout.temperature)
    if readout.softcap is None:
        return x * (readout.scale * factor), readout.scale * factor
    tanh = torch.tanh(x * (readout.scale / readout.softcap))
    return readout.softcap * tanh * factor, readout.scale * factor * (1 - tanh * tanh)


def _masked(value: Tensor, target: Tensor, vocab: int) -> Tensor:
    """0 in ignored rows, NaN in rows whose target is not in the vocabulary."""
    inside = (target >= 0) & (target < vocab)
    value = torch.where(inside, value, torch.full_like(value, torch.nan))
    return torch.where(target == IGNORE, torch.zeros_like(value), value)


def _of_target(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(-1, target.clamp(0, values.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)


def token_stats(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowStats:
    z, _ = _readout(logits, readout)
    vocab = logits.shape[-1]
    # Not torch.logsumexp: a row with an infinite logit has no distribution, and must say so.
    peak = z.amax(-1)
    below = z - peak.unsqueeze(-1)
    log_s = torch.log(torch.exp(below).sum(-1))
    lse = torch.where(peak == -torch.inf, peak, peak + log_s)
    # Not by way of lse, in which large logits would round log s away.
    log_p = below - log_s.unsqueeze(-1)
    logp = _of_target(log_p, target)
    p = log_p.exp()
    entropy = -torch.where(p == 0, p, p * log_p).sum(-1)
    return RowStats(*(_masked(x, target, vocab) for x in (logp, entropy, lse)))


def token_observations(logits: Tensor, target: Tensor, readout: ReadoutArgs) -> RowObservations:
    stats = token_stats(logits, target, readout)
    z, _ = _readout(logits, readout)
    vocab = logits.shape[-1]
    peak = z.amax(-1)
    # Nothing is NaN yet where nothing but -inf is in a row.
    e = torch.exp(z - torch.where(peak == -torch.inf, 0, peak).unsqueeze(-1))
    s = e.sum(-1)
    log_sum_sq_probs = (torch.log((e * e).sum(-1)) - 2 * torch.log(s)).clamp(max=0)
    signed = -logits if readout.scale < 0 else logits
    largest = torch.where(s.isnan(), torch.nan, signed.amax(-1).to(z.dtype))
    log_sum_sq_probs, mean, largest = (_masked(x, target, vocab) for x in (log_sum_sq_probs, z.mean(-1), largest))
    known = (target >= 0) & (target < vocab) & ~s.isnan()
    return RowObservations(*stats, log_sum_sq_probs, mean, largest, torch.where(known, signed.argmax(-1), -1))


def token_stats_backward(
    logits: Tensor,
    target: Tensor,
    stats: RowStats,
    gradients: RowGradients,
    readout: ReadoutArgs,
    d_logits: Tensor,
) -> None:
    z, slope = _readout(logits, readout)
    vocab = logits.shape[-1]
    zero = torch.zeros_like(stats.lse)
    d_logp, d_entropy, d_lse = (zero if g is None else g.to(zero.dtype) for g in gradients)
    # log p_j is (z_j - z_y) + logp or z_j - lse. The number of smaller size brings the smaller rounding.
    near = stats.logp.abs() < stats.lse.abs()
    base, at_base = torch.where(near, _of_target(z, target), zero), torch.where(near, stats.logp, -stats.lse)
    log_p = (z - base.unsqueeze(-1)) + at_base.unsqueeze(-1)
    p = log_p.exp()
    d_z = p * (d_lse - d_logp).unsqueeze(-1)
    if gradients.d_entropy is not None:
        surprise = log_p + stats.entropy.unsqueeze(-1)
        d_z -= torch.where(p == 0, p, p * surprise) * d_entropy.unsqueeze(-1)
    # p_y close to 1 would cancel in d_logp (1 - p_y) if it were summed from two rounded terms.
    p_y = stats.logp.exp()
    at_target = -d_logp * torch.expm1(stats.logp) + d_lse * p_y
    at_target -= d_entropy * torch.where(p_y == 0, p_y, p_y * (stats.logp + stats.entropy))
    d_z.scatter_(-1, target.clamp(0, vocab - 1).unsqueeze(-1), at_target.unsqueeze(-1))
    d_logits.copy_(_masked(d_z * slope, target.unsqueeze(-1), vocab))


def fused_loss(
    logits: Tensor,
    target: Tensor,
    fields: RowFields,
    readout: ReadoutArgs,
    code: Sequence[int],
    params: Tensor,
    d_logits: Tensor,
    kernel: str,
) -> FusedRows:
    stats = token_stats(logits, target, readout)
    inputs = stats._asdict()
    inputs |= {name: x for name, x in fields._asdict().items() if x is not None and name != "weight"}
    inputs.setdefault("old_logp", stats.logp)
    outputs = evaluate(Program.decode(code), inputs, params)
    used = target != IGNORE
    loss, *gradients = (torch.where(used, x * fields.weight, torch.zeros_like(x)) for x in outputs)
    token_stats_backward(logits, target, stats, RowGradients(*gradients), readout, d_logits)
    return FusedRows(loss, stats.logp, stats.entropy)


def scale_(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)
