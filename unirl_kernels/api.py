"""What users call: checks the arguments, chooses backend and kernel, composes the operators. No mathematics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels import ops
from unirl_kernels.backends import COMPOSED, Choice, choose
from unirl_kernels.batch import Batch, check_dtype
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.objectives.policy import kl_estimate
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenStats(NamedTuple):
    """Statistics of each token's row of logits, differentiable in the logits. Target's shape, float32 (float64 for
    float64 logits); 0 where the target is ``IGNORE``.

    Args:
        logp: log pi(o_t) = z_y - lse, <= 0, nats.
        entropy: H = lse - sum_j p_j z_j of the whole distribution, in [0, log V], nats.
        lse: log sum_j exp(z_j).
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What ``fused_loss`` returns.

    Args:
        loss: 0-dim, float32 (float64 for float64 logits), differentiable in the logits.
        logp, entropy: target's shape, detached; 0 where the target is ``IGNORE``.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    _batch: Batch
    _loss: Loss

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Means over the valid tokens, 0-dim tensors, computed when read and without waiting for a device.

        ``entropy``; ``ratio_mean``, pi / pi_old (1 on policy); ``kl``, estimate k3 of KL(pi || pi_ref), where the
        batch has ``ref_logp``; and what the objective adds, such as ``clip_fraction``.
        """
        with torch.no_grad():
            tokens = Tokens(self._batch, self.logp, self.entropy, torch.zeros_like(self.logp))
            values = {"entropy": tokens.entropy, "ratio_mean": torch.exp(tokens.logp - tokens.old_logp)}
            if self._batch.ref_logp is not None:
                values["kl"] = kl_estimate(tokens)
            values |= getattr(self._loss.objective, "metrics", lambda t: {})(tokens)
            valid = self._batch.valid.reshape(-1)
            n = valid.sum().clamp(min=1)
            return {name: torch.where(valid, x, torch.zeros_like(x)).sum() / n for name, x in values.items()}


def token_stats(
    logits: Tensor,  # [B, L, V] or [T, V]
    target: Tensor,  # [B, L] or [T]
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of each token's row, in one read of the logits.

        lse = log sum_j e^{z_j}        logp = z_y - lse        H = lse - sum_j p_j z_j,        p = softmax(z)

    A drop-in for ``log_softmax`` + ``gather`` and for the entropy of the policy; gradients flow from all three.

    Args:
        logits: [B, L, V] or [T, V]; float32, bfloat16 or float16 (float64 for checks), last dimension contiguous.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a row is not read and gets zero gradient.
        readout: how logits become a distribution.
        plan: how the machine computes it.

    Returns:
        ``TokenStats``.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.
    """
    _check_logits(logits, target)
    backend, _ = choose(logits.device, plan.backend, plan.kernel)
    args = (_places(target), *_readout(readout, logits, target), backend)
    if plan.overwrite_logits and _wants_gradient(logits):
        _check_overwritable(logits)
        stats = ops.OverwritingStats.apply(logits, *args)
    else:
        stats = torch.ops.unirl.token_stats(ops.as_rows(logits), *args)
    return TokenStats(*(x.view(target.shape) for x in stats))


def fused_loss(
    logits: Tensor,  # [B, L, V] or [T, V]
    batch: Batch,
    loss: Loss,
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> LossOutput:
    """The loss of a batch, with its gradient computed in the same pass over the logits.

        L = sum_t w_t f(logp_t, entropy_t, ...),      dL/dz_j = w_t (f_logp (1[j=y] - p_j) + ...)

    A token-scope objective runs inside the kernel: one read and one write of the logits. An objective of sequence
    or pair scope takes two passes: statistics, then the gradient in ``backward``.

    Args:
        logits: [B, L, V] or [T, V], as ``batch.target`` is laid out; float32, bfloat16 or float16 (float64 for
            checks), last dimension contiguous.
        batch: what to learn from.
        loss: objective and aggregation.
        readout: how logits become a distribution.
        plan: how the machine computes it.

    Returns:
        ``LossOutput``.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came; when the
            objective reads a field that the batch lacks, or uses an operation that the kernel cannot run.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.
    """
    _check_logits(logits, batch.target)
    choice = choose(logits.device, plan.backend, plan.kernel)
    if loss.scope != "token" and plan.kernel not in (None, COMPOSED):
        raise ValueError(f"kernel must be 'composed' for a {loss.scope}-scope objective, got {plan.kernel!r}")
    if loss.scope == "token" and choice.kernel != COMPOSED:
        loss.traced  # noqa: B018  an objective that kernels cannot run must not pass where no gradient is wanted
        if _wants_gradient(logits):
            return _one_pass(logits, batch, loss, readout, plan, choice)
    return _composed(logits, batch, loss, readout, plan)


def _one_pass(logits: Tensor, batch: Batch, loss: Loss, readout: Readout, plan: Plan, choice: Choice) -> LossOutput:
    traced = loss.traced
    fields = (_weights(loss, batch, logits), *_fields(traced.reads, batch, logits))
    program = (traced.code, loss.params(logits.device), *choice)
    args = (_places(batch.target), *fields, *_readout(readout, logits, batch.target), *program)
    if plan.overwrite_logits:
        _check_overwritable(logits)
    value, logp, entropy = ops.OnePass.apply(plan.overwrite_logits, logits, *args)
    if plan.overwrite_logits:
        ops.consume(logits)
    shape = batch.target.shape
    return LossOutput(value, logp.view(shape), entropy.view(shape), batch, loss)


def _composed(logits: Tensor, batch: Batch, loss: Loss, readout: Readout, plan: Plan) -> LossOutput:
    stats = token_stats(logits, batch.target, readout=readout, plan=Plan(plan.backend, None, plan.overwrite_logits))
    values = loss.objective(Tokens(batch, *stats))
    weights = loss.aggregation.weights(batch).reshape(-1).to(values.dtype)
    if values.shape != weights.shape:
        raise ValueError(f"objective must return one loss per {_unit(loss)}, {len(weights)}, got {tuple(values.shape)}")
    # Ignored places weigh 0, but 0 * inf would not be 0.
    value = torch.where(weights == 0, torch.zeros_like(values), values * weights).sum()
    return LossOutput(value, stats.logp.detach(), stats.entropy.detach(), batch, loss)


def _unit(loss: Loss) -> str:
    return "pair" if loss.scope == "pair" else "token"


def _check_logits(logits: Tensor, target: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    check_dtype("target", target, torch.int64)
    if logits.dtype not in LOGITS_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in LOGITS_DTYPES)
        raise TypeError(f"logits must be one of {names}, got {str(logits.dtype).removeprefix('torch.')}")
    if target.dim() not in (1, 2) or logits.shape[:-1] != target.shape or logits.dim() != target.dim() + 1:
        expected = ", ".join(str(n) for n in target.shape)
        raise ValueError(f"logits must have shape ({expected}, V), got {tuple(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        raise ValueError(f"logits must be contiguous in the last dimension, got strides {logits.stride()}")
    if logits.device != target.device:
        raise ValueError(f"target must be on {logits.device} like logits, got {target.device}")


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError("overwrite_logits=True needs logits that were computed; got a leaf that requires a gradient")
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(f"overwrite_logits=True needs logits of distinct elements, got strides {logits.stride()}")


def _wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def _places(per_token: Tensor) -> Tensor:
    return (per_token if per_token.dim() == 2 else per_token.unsqueeze(0)).contiguous()


def _row_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _weights(loss: Loss, batch: Batch, logits: Tensor) -> Tensor:
    return _places(loss.aggregation.weights(batch)).to(_row_dtype(logits))


def _fields(reads: frozenset[str], batch: Batch, logits: Tensor) -> list[Tensor | None]:
    """advantage, old_logp, ref_logp as [B, L], where the objective reads them."""
    fields: list[Tensor | None] = []
    for name in ("advantage", "old_logp", "ref_logp"):
        value: Tensor | None = getattr(batch, name) if name in reads else None
        if value is None:
            if name in reads and name != "old_logp":
                raise ValueError(f"the objective reads {name}, but batch.{name} is None")
            fields.append(None)
            continue
        if value.shape != batch.target.shape:
            value = batch.per_token(value)
        fields.append(_places(value).to(_row_dtype(logits)))
    return fields


def _readout(readout: Readout, logits: Tensor, target: Tensor) -> tuple[object, ...]:
    """A readout as the operators take it: scale, softcap, temperature, temperature per row."""
    temperature = readout.temperature
    if not isinstance(temperature, Tensor):
        return readout.scale, readout.softcap, float(temperature), None
    if temperature.shape != target.shape:
        raise ValueError(f"temperature must have shape {tuple(target.shape)}, got {tuple(temperature.shape)}")
    if temperature.device != logits.device:
        raise ValueError(f"temperature must be on {logits.device} like logits, got {temperature.device}")
    return readout.scale, readout.softcap, 1.0, _places(temperature).to(_row_dtype(logits))
