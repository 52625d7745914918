"""Levels 1 and 2 on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels import ops
from unirl_kernels.api.arguments import (
    check_device,
    check_kinds,
    check_numbers,
    check_places,
    check_targets,
    kernel_of,
    places,
    readout_arguments,
    row_dtype,
    row_fields,
    row_weights,
)
from unirl_kernels.api.outputs import LossOutput, TokenObservations, TokenStats
from unirl_kernels.backends import COMPOSED, Choice, choose
from unirl_kernels.batch import Batch, check_dtype
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout


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
    return TokenStats(*_measured("token_stats", logits, target, readout, plan))


def token_observations(
    logits: Tensor,  # [B, L, V] or [T, V]
    target: Tensor,  # [B, L] or [T]
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> TokenObservations:
    """``token_stats``, and what else shows in the same read of the logits: collision probability, mean, top word.

        log_sum_sq_probs = log sum_j p_j^2        mean_logit = 1/V sum_j z_j        argmax = min argmax_j z_j

    What loss heads of trainers report beside the log-probabilities. Gradients flow from logp, entropy and lse as in
    ``token_stats``; the rest is only observed.

    Args:
        logits: [B, L, V] or [T, V]; float32, bfloat16 or float16 (float64 for checks), last dimension contiguous.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a row is not read and gets zero gradient.
        readout: how logits become a distribution, and what z is.
        plan: how the machine computes it.

    Returns:
        ``TokenObservations``.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN, its
            argmax -1).
        RuntimeError: when the named backend cannot run here.
    """
    return TokenObservations.of_rows(_measured("token_observations", logits, target, readout, plan))


def _measured(operator: str, logits: Tensor, target: Tensor, readout: Readout, plan: Plan) -> list[Tensor]:
    """What an operator finds in each row, in target's shape."""
    check_kinds(readout=readout, plan=plan)
    _check_logits(logits, target)
    backend, _ = choose(logits.device, plan.backend, plan.kernel)
    args = (places(target), *readout_arguments(readout, target, row_dtype(logits.dtype)), backend)
    if plan.overwrite_logits and _wants_gradient(logits):
        _check_overwritable(logits)
        rows = ops.OverwritingStats.apply(operator, logits, *args)
    else:
        rows = getattr(torch.ops.unirl, operator)(ops.as_rows(logits), *args)
    return [x.view(target.shape) for x in rows]


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
    or pair scope takes two passes, statistics, then the gradient in ``backward``; so do fp16 logits, whose gradient is
    rounded after a loss scale has multiplied it, unless ``plan`` names a kernel.

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
    check_kinds(batch=batch, loss=loss, readout=readout, plan=plan)
    _check_logits(logits, batch.target)
    choice = kernel_of(loss, plan, logits.device)
    # A gradient in fp16 has to wait for the upstream one, which holds the loss scale: 1e-8 would be 0.
    waits = logits.dtype == torch.float16 and plan.kernel is None
    if choice.kernel != COMPOSED and _wants_gradient(logits) and not waits:
        return _one_pass(logits, batch, loss, readout, plan, choice)
    return _composed(logits, batch, loss, readout, plan)


def _one_pass(logits: Tensor, batch: Batch, loss: Loss, readout: Readout, plan: Plan, choice: Choice) -> LossOutput:
    traced, dtype = loss.traced, row_dtype(logits.dtype)
    rows = (places(batch.target), row_weights(loss, batch, dtype), *row_fields(traced.reads, batch, dtype))
    program = (traced.code, loss.params(logits.device), *choice)
    if plan.overwrite_logits:
        _check_overwritable(logits)
    args = (*rows, *readout_arguments(readout, batch.target, dtype), *program)
    value, logp, entropy = ops.OnePass.apply(plan.overwrite_logits, logits, *args)
    if plan.overwrite_logits:
        ops.consume(logits)
    shape = batch.target.shape
    return LossOutput(value, logp.view(shape), entropy.view(shape), batch, loss)


def _composed(logits: Tensor, batch: Batch, loss: Loss, readout: Readout, plan: Plan) -> LossOutput:
    stats = token_stats(logits, batch.target, readout=readout, plan=Plan(plan.backend, None, plan.overwrite_logits))
    value = loss.composed(Tokens(batch, *stats), loss.aggregation.weights(batch))
    return LossOutput(value, stats.logp.detach(), stats.entropy.detach(), batch, loss)


def _check_logits(logits: Tensor, target: Tensor) -> None:
    check_numbers("logits", logits)
    check_dtype("target", target, torch.int64)
    check_places("logits", logits, target, "V")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column, got shape {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        raise ValueError(f"logits must be contiguous in the last dimension, got strides {logits.stride()}")
    check_device("target", target, logits.device, "logits")
    check_targets(target, logits.shape[-1])


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "overwrite_logits=True needs logits that were computed; "
            "got a leaf that requires a gradient, or a view of one"
        )
    reach = logits.shape[-1]
    for stride, size in sorted(zip(logits.stride()[:-1], logits.shape[:-1], strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(f"overwrite_logits=True needs rows that do not overlap, got strides {logits.stride()}")
        reach += (size - 1) * stride


def _wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad
