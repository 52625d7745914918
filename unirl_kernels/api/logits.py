"""Levels 1 and 2 on logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unirl_kernels.api.arguments import check_kinds, check_logits, check_overwritable, kernel_of
from unirl_kernels.api.outputs import LossOutput, TokenObservations, TokenStats
from unirl_kernels.api.rows import as_rows, program_args, readout_args, row_dtype
from unirl_kernels.backends import COMPOSED, Choice, choose
from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators.autograd import Observations, OnePass, Statistics
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
    return TokenStats(*_measured(Statistics, logits, target, readout, plan))


def token_observations(
    logits: Tensor,  # [B, L, V] or [T, V]
    target: Tensor,  # [B, L] or [T]
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> TokenObservations:
    """``token_stats``, and what else shows in the same read of the logits: collision probability, mean, top token.

        log_sum_sq_probs = log sum_j p_j^2        mean_logit = 1/V sum_j z_j        argmax = min argmax_j z_j

    What loss heads of trainers report beside the log-probabilities. Gradients flow from logp, entropy and lse; the rest
    is only observed. Arguments and errors are those of ``token_stats``; the argmax of a row whose target is outside the
    vocabulary is -1.

    Returns:
        ``TokenObservations``.
    """
    return TokenObservations.of_rows(_measured(Observations, logits, target, readout, plan))


def _measured(function: Any, logits: Tensor, target: Tensor, readout: Readout, plan: Plan) -> list[Tensor]:
    """What an autograd function finds in each row, in target's shape."""
    check_kinds(readout=readout, plan=plan)
    check_logits(logits, target)
    backend, _ = choose(logits.device, plan.backend, plan.kernel)
    overwrite = plan.overwrite_logits and _wants_gradient(logits)
    if overwrite:
        check_overwritable(logits)
    of_readout = readout_args(readout, target, row_dtype(logits.dtype))
    found = function.apply(logits, as_rows(target), of_readout, backend, overwrite)
    return [x.view(target.shape) for x in found]


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

    Terms of token scope run inside the kernel: one read and one write of the logits. A loss with a term of wider scope
    takes two passes, statistics, then the gradient in ``backward``; so do fp16 logits, whose gradient is rounded after
    a loss scale has multiplied it, unless ``plan`` names a kernel.

    Args:
        logits: [B, L, V] or [T, V], as ``batch.target`` is laid out; float32, bfloat16 or float16 (float64 for
            checks), last dimension contiguous.
        batch: what to learn from.
        loss: objective and aggregation, or a sum of losses.
        readout: how logits become a distribution.
        plan: how the machine computes it.

    Returns:
        ``LossOutput``.

    Raises:
        TypeError, ValueError: when an argument does not fit, naming it, what was expected and what came; when an
            objective reads a field that the batch lacks, or uses an operation that the kernel cannot run.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.
    """
    check_kinds(batch=batch, loss=loss, readout=readout, plan=plan)
    check_logits(logits, batch.target)
    choice = kernel_of(loss, plan, logits.device)
    # A gradient in fp16 has to wait for the upstream one, which holds the loss scale: 1e-8 would be 0.
    waits = logits.dtype == torch.float16 and plan.kernel is None
    if choice.kernel != COMPOSED and _wants_gradient(logits) and not waits:
        return _one_pass(logits, batch, loss, readout, plan, choice)
    stats = token_stats(logits, batch.target, readout=_spread(readout, batch), plan=_for_statistics(plan))
    value = loss.composed(Tokens(batch, *stats), loss.weights(batch))
    return LossOutput.of(value, stats, batch, loss)


def _one_pass(logits: Tensor, batch: Batch, loss: Loss, readout: Readout, plan: Plan, choice: Choice) -> LossOutput:
    dtype, target = row_dtype(logits.dtype), batch.target
    program, of_readout = program_args(loss, batch, dtype), readout_args(readout, target, dtype, batch)
    if plan.overwrite_logits:
        check_overwritable(logits)
    value, *stats = OnePass.apply(logits, as_rows(target), of_readout, program, *choice, plan.overwrite_logits)
    return LossOutput.of(value, stats, batch, loss)


def _spread(readout: Readout, batch: Batch) -> Readout:
    """A readout whose temperature has a value per token."""
    temperature = readout.temperature
    if not isinstance(temperature, Tensor) or temperature.shape == batch.target.shape:
        return readout
    return Readout(batch.per_token(temperature), readout.softcap, readout.scale)


def _for_statistics(plan: Plan) -> Plan:
    return Plan(plan.backend, None, plan.overwrite_logits)


def _wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad
