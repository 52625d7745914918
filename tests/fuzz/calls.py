"""Calls the package with a case, and flattens the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import unirl_kernels as uk
from tests.fuzz.inputs import Inputs, strided
from unirl_kernels.backends import load

Answer = dict[str, Tensor]
"""logp, entropy, lse, observations: [T]; loss: []; terms: [n]; d_logits: [T, V]; d_hidden: [T, D]; d_weight, d_bias."""

ARGUMENTS = ("advantage", "old_logp", "ref_logp")
STATISTICS = ("logp", "entropy", "lse")


@dataclass(frozen=True)
class Request:
    """A call.

    Args:
        inputs: tensors.
        upstream: [3, T], gradients of the statistics, NaN where there is none; or [], the loss's.
        loss: of the two loss functions.
        plan: the machine.
        gradient: whether one is wanted.
    """

    inputs: Inputs
    upstream: Tensor
    loss: uk.Loss | None
    plan: uk.Plan
    gradient: bool = True


def request_of(inputs: Inputs, loss: uk.Loss | None) -> Request:
    """The call of the case: its loss, or statistics if that is None, with upstream gradients and plan."""
    case = inputs.case
    plan = uk.Plan(case.backend, case.kernel, max_chunk_bytes=chunk_bytes(inputs, case.chunk))
    if loss is not None:
        return Request(inputs, torch.tensor(case.upstream), loss, plan)
    random = case.random("upstream")
    generator = torch.Generator().manual_seed(random.getrandbits(60))
    upstream = torch.randn(3, len(inputs.flat_target), dtype=torch.float64, generator=generator)
    kept = [random.random() < 0.6 for _ in range(3)]
    kept[random.randrange(3)] = True
    upstream[torch.tensor(kept).logical_not()] = torch.nan
    garbage = random.choice((0.0, 1e30, torch.nan))
    upstream[torch.tensor(kept)] = torch.where(inputs.valid, upstream[torch.tensor(kept)].float().double(), garbage)
    return Request(inputs, upstream, None, plan)


def chunk_bytes(inputs: Inputs, tokens: int) -> int | None:
    """``max_chunk_bytes`` for chunks of so many tokens; None for all in one."""
    if not tokens or inputs.weight is None or inputs.hidden is None:
        return None
    return tokens * load(inputs.case.backend).matmuls(inputs.weight, inputs.hidden.dtype).row_bytes


def used_statistics(upstream: Tensor, valid: Tensor) -> list[int]:
    """Which statistics a gradient flows from: all but those whose upstream gradient is NaN even where rows count."""
    return [k for k in range(3) if not (upstream[k].isnan().all() and bool(valid.any() or k))]


def batch_of(inputs: Inputs) -> uk.Batch:
    given = {name: inputs.fields[name] for name in ARGUMENTS if name in inputs.fields}
    others = {name: x for name, x in inputs.fields.items() if name not in ARGUMENTS}
    pairs: Any = "interleaved" if inputs.interleaved else "halves"
    return uk.Batch(inputs.target, **given, cu_seqlens=inputs.cu_seqlens, fields=others, pairs=pairs)


def ask(request: Request) -> Answer:
    """Call the package."""
    with torch.set_grad_enabled(request.gradient):
        return _ask(request)


def _ask(request: Request) -> Answer:
    inputs, plan = request.inputs, request.plan
    case = inputs.case
    readout = uk.Readout(inputs.temperature, case.softcap, case.scale)
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in (
            ("logits", inputs.logits),
            ("hidden", inputs.hidden),
            ("weight", inputs.weight),
            ("bias", inputs.bias),
        )
        if x is not None
    }
    function = getattr(uk, FUNCTIONS[case.level])
    operands = _operands(leaves, plan.overwrite_logits)
    named = {"readout": readout, "plan": plan} | ({"bias": leaves.get("bias")} if case.linear else {})
    if request.loss is not None:
        out = function(*operands, batch_of(inputs), request.loss, **named)
        answer = {name: getattr(out, name).reshape(-1) for name in STATISTICS}
        answer |= {"loss": out.loss.detach(), "terms": torch.stack(list(out.terms))}
        outputs, upstreams = [out.loss], [request.upstream.to(out.loss.dtype)]
    else:
        out = function(*operands, inputs.target, **named)
        answer = {name: x.detach().reshape(-1) for name, x in out._asdict().items()}
        used = [k for k in range(3) if not _absent(request.upstream[k], inputs.valid)]
        outputs = [out[k] for k in used]
        turned = case.random("upstream strides")
        upstreams = [strided(request.upstream[k].to(out.logp.dtype).reshape(out.logp.shape), turned) for k in used]
    if request.gradient:
        answer |= _gradients(outputs, upstreams, leaves)
    return answer


FUNCTIONS = {
    "stats": "token_stats",
    "observations": "token_observations",
    "loss": "fused_loss",
    "linear_stats": "linear_token_stats",
    "linear_observations": "linear_token_observations",
    "linear_loss": "fused_linear_loss",
}


def _absent(upstream: Tensor, valid: Tensor) -> bool:
    """Whether no gradient flows from a statistic."""
    return bool(upstream[valid].isnan().all()) if bool(valid.any()) else False


def _operands(leaves: dict[str, Tensor], overwrite: bool) -> list[Tensor]:
    if "hidden" in leaves:
        return [leaves["hidden"], leaves["weight"]]
    logits = leaves["logits"]
    if overwrite:  # computed, as in a model, in the same layout
        logits = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)
    return [logits]


def _gradients(outputs: list[Tensor], upstreams: list[Tensor], leaves: dict[str, Tensor]) -> Answer:
    if not any(x.requires_grad for x in outputs):
        return {f"d_{name}": torch.zeros_like(x) for name, x in _flat(leaves).items()}
    found = torch.autograd.grad(outputs, list(leaves.values()), upstreams, allow_unused=True)
    gradients = {
        name: torch.zeros_like(x) if d is None else d for (name, x), d in zip(leaves.items(), found, strict=True)
    }
    return {f"d_{name}": x for name, x in _flat(gradients).items()}


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and hidden states with one row for each position."""
    return {name: x.reshape(-1, x.shape[-1]) if name in ("logits", "hidden") else x for name, x in tensors.items()}
