"""The oracle: equations (2) to (15) of Shao et al. 2024 (arXiv:2402.03300v3), written naively.

It uses a full log-softmax, gather, a Python loop over the sequences, and autograd. It shares no code with the
objectives or the kernels, so a comparison tests both. With fp64 logits it is the truth for all tests; with fp32 or bf16
logits it is what people write by hand.

Every function reads these attributes of ``batch``: target, advantage, old_logp, ref_logp, cu_seqlens. The fp32 fields
of a batch need no conversion: with fp64 logits they are exact inputs of an fp64 computation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def apply_readout(
    logits: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    """z = softcap tanh(scale x / softcap) / temperature, on [..., V]; a tensor of temperatures has shape [...]."""
    z = logits * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)


def log_probs(logits: Tensor, target: Tensor) -> Tensor:
    """log pi(o_t), target's shape; 0 at ignored positions."""
    used = target != IGNORED
    all_log_probs = torch.log_softmax(logits, -1)
    chosen = all_log_probs.gather(-1, torch.where(used, target, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(used, chosen, 0.0)


def entropy(logits: Tensor) -> Tensor:
    """H = -sum_j p_j log p_j, shape [...] from [..., V]."""
    all_log_probs = torch.log_softmax(logits, -1)
    p = all_log_probs.exp()
    return -(p * torch.where(p > 0, all_log_probs, 0.0)).sum(-1)


def sequences(batch: Any) -> list[Tensor]:
    """Flat indices of the valid tokens, one tensor per sequence."""
    flat = batch.target.reshape(-1)
    if batch.cu_seqlens is None:
        length = batch.target.shape[1]
        ends = [length * i for i in range(batch.target.shape[0] + 1)]
    else:
        ends = batch.cu_seqlens.tolist()
    places = torch.arange(flat.numel(), device=flat.device)
    return [places[a:b][flat[a:b] != IGNORED] for a, b in itertools.pairwise(ends)]


def _advantages(batch: Any, tokens: list[Tensor]) -> list[Tensor]:
    """A_{i,t} for the valid tokens of each sequence."""
    if batch.advantage.shape == batch.target.shape:
        return [batch.advantage.reshape(-1)[o] for o in tokens]
    return [batch.advantage[i].expand(len(o)) for i, o in enumerate(tokens)]


def _aggregate(per_token: list[Tensor], how: str = "sequence_mean", n: float | None = None) -> Tensor:
    """One number from the losses of each sequence's tokens."""
    total = per_token[0].new_zeros(())
    for losses in per_token:
        if how == "sequence_mean" and len(losses):
            total = total + losses.mean() / len(per_token)
        elif how == "token_mean":
            total = total + losses.sum() / (n if n is not None else max(1, sum(len(x) for x in per_token)))
        elif how == "fixed_length":
            total = total + losses.sum() / (n * len(per_token))  # type: ignore[operator]
    return total


def _old(batch: Any, logp: Tensor) -> Tensor:
    return logp.detach() if batch.old_logp is None else batch.old_logp.reshape(-1).to(logp.dtype)


def sft(logits: Tensor, batch: Any, **aggregation: Any) -> Tensor:
    """Equation (2): J = E[1/|o| sum_t log pi(o_t)]; the loss is -J, here and below."""
    logp = log_probs(logits, batch.target).reshape(-1)
    return _aggregate([-logp[o] for o in sequences(batch)], **aggregation)


def rft(logits: Tensor, batch: Any, **aggregation: Any) -> Tensor:
    """Equation (3): J = E[1/|o| sum_t I(o) log pi(o_t)]."""
    logp = log_probs(logits, batch.target).reshape(-1)
    tokens = sequences(batch)
    verdicts = _advantages(batch, tokens)
    return _aggregate([-i * logp[o] for o, i in zip(tokens, verdicts, strict=True)], **aggregation)


def online_rft(logits: Tensor, batch: Any, **aggregation: Any) -> Tensor:
    """Equation (5): the same expression as (3), on samples of the policy."""
    return rft(logits, batch, **aggregation)


def dpo(logits: Tensor, batch: Any, beta: float = 0.1, length_normalized: bool = False) -> Tensor:
    """Equation (6), summed over the sequence (Rafailov et al. 2023) or averaged as printed."""
    logp = log_probs(logits, batch.target).reshape(-1)
    ref = batch.ref_logp.reshape(-1).to(logp.dtype)
    tokens = sequences(batch)
    half = len(tokens) // 2
    losses = []
    for chosen, rejected in zip(tokens[:half], tokens[half:], strict=True):
        margin = logp.new_zeros(())
        for o, sign in ((chosen, 1), (rejected, -1)):
            ratio = (logp[o] - ref[o]).sum()
            margin = margin + sign * beta * (ratio / max(1, len(o)) if length_normalized else ratio)
        losses.append(torch.log(1 + torch.exp(-margin)))
    return torch.stack(losses).mean()


def ppo(logits: Tensor, batch: Any, clip: float | tuple[float, float] = 0.2, **aggregation: Any) -> Tensor:
    """Equation (8): J = E[1/|o| sum_t min(r A, clip(r, 1 - low, 1 + high) A)], r = pi / pi_old."""
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    logp = log_probs(logits, batch.target).reshape(-1)
    old = _old(batch, logp)
    tokens = sequences(batch)
    losses = []
    for o, advantage in zip(tokens, _advantages(batch, tokens), strict=True):
        r = torch.exp(logp[o] - old[o])
        clipped = torch.clamp(r, 1 - low, 1 + high)
        losses.append(-torch.minimum(r * advantage, clipped * advantage))
    return _aggregate(losses, **aggregation)


def grpo(
    logits: Tensor,
    batch: Any,
    clip: float | tuple[float, float] | None = 0.2,
    beta: float = 0.04,
    **aggregation: Any,
) -> Tensor:
    """Equation (12), with the clip of (8) unless None; the KL term is the estimator of equation (4) there."""
    low, high = (float("inf"), float("inf")) if clip is None else clip if isinstance(clip, tuple) else (clip, clip)
    logp = log_probs(logits, batch.target).reshape(-1)
    old = _old(batch, logp)
    ref = batch.ref_logp.reshape(-1).to(logp.dtype) if beta else logp.detach()
    tokens = sequences(batch)
    losses = []
    for o, advantage in zip(tokens, _advantages(batch, tokens), strict=True):
        r = torch.exp(logp[o] - old[o])
        surrogate = torch.minimum(r * advantage, torch.clamp(r, 1 - low, 1 + high) * advantage)
        ref_ratio = torch.exp(ref[o] - logp[o])
        losses.append(-(surrogate - beta * (ref_ratio - torch.log(ref_ratio) - 1)))
    return _aggregate(losses, **aggregation)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sft": sft,
    "rft": rft,
    "online_rft": online_rft,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
}


def loss(algorithm: str, logits: Tensor, batch: Any, **hyper: Any) -> Tensor:
    """The loss of one of ``LOSSES`` as a differentiable scalar.

    Args:
        algorithm: a key of ``LOSSES``.
        logits: [B, L, V] or [T, V], any floating dtype.
        batch: see the module.
        hyper: the recipe's arguments; for all but ``dpo`` also ``how`` in {sequence_mean, token_mean,
            fixed_length} and its ``n``.
    """
    return LOSSES[algorithm](logits, batch, **hyper)


def coefficients(algorithm: str, logp: Tensor, batch: Any, **hyper: Any) -> Tensor:
    """GC of every token, [T], typed in from equations (4), (7), (11) and (15) without any differentiation.

    (11) and (15) are printed for the on-policy case; off policy the first term is r A inside the clip and 0 where
    the clip is active. (7) carries the factor beta and, summed, the factor |o|, which equation (1) divides out.
    """
    logp = logp.detach().reshape(-1)
    gc = torch.zeros_like(logp)
    tokens = sequences(batch)
    if algorithm == "dpo":
        return _dpo_coefficients(logp, batch, tokens, **hyper)
    for i, o in enumerate(tokens):
        if algorithm == "sft":
            gc[o] = 1.0
            continue
        advantage = _advantages(batch, tokens)[i].to(gc.dtype)
        if algorithm in ("rft", "online_rft"):
            gc[o] = advantage
            continue
        r = torch.exp(logp[o] - _old(batch, logp)[o])
        clip = hyper.get("clip", 0.2)
        low, high = (float("inf"),) * 2 if clip is None else clip if isinstance(clip, tuple) else (clip, clip)
        active = ((advantage > 0) & (r > 1 + high)) | ((advantage < 0) & (r < 1 - low))
        gc[o] = torch.where(active, 0.0, r * advantage)
        if algorithm == "grpo" and (beta := hyper.get("beta", 0.04)):
            ref = batch.ref_logp.reshape(-1)[o].to(gc.dtype)
            gc[o] += beta * (torch.exp(ref - logp[o]) - 1)
    return gc


def _dpo_coefficients(
    logp: Tensor, batch: Any, tokens: list[Tensor], beta: float = 0.1, length_normalized: bool = False
) -> Tensor:
    gc = torch.zeros_like(logp)
    ref = batch.ref_logp.reshape(-1).to(logp.dtype)
    half = len(tokens) // 2
    for chosen, rejected in zip(tokens[:half], tokens[half:], strict=True):
        rewards = [
            beta * (logp[o] - ref[o]).sum() / (max(1, len(o)) if length_normalized else 1) for o in (chosen, rejected)
        ]
        strength = beta * torch.sigmoid(rewards[1] - rewards[0])
        for o, sign in ((chosen, 1), (rejected, -1)):
            gc[o] = sign * strength * (1 if length_normalized else len(o))
    return gc


def gradient(algorithm: str, logits: Tensor, batch: Any, **hyper: Any) -> Tensor:
    """Gradient of the loss with respect to the logits by equation (1): -1/(S |o|) GC (1[j = o_t] - p_j).

    DPO's mean runs over S/2 pairs instead of S sequences.
    """
    flat = logits.detach().reshape(-1, logits.shape[-1])
    target = batch.target.reshape(-1)
    gc = coefficients(algorithm, log_probs(flat, target), batch, **hyper)
    tokens = sequences(batch)
    units = len(tokens) // 2 if algorithm == "dpo" else len(tokens)
    d_logits = torch.zeros_like(flat)
    for o in tokens:
        if len(o):
            p = torch.softmax(flat[o], -1)
            one_hot = torch.nn.functional.one_hot(target[o], flat.shape[-1]).to(p.dtype)
            d_logits[o] = -(gc[o] / (units * len(o))).unsqueeze(-1) * (one_hot - p)
    return d_logits.reshape(logits.shape)
