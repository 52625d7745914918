"""Levels 1 and 2 on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.api.agreement import Brought, agreed
from unirl_kernels.api.arguments import (
    Given,
    check_kind,
    check_logits,
    check_overwritable,
    check_split,
    kernel_of,
    target_of,
    wants_gradient,
)
from unirl_kernels.api.dtensors import shard_of_logits
from unirl_kernels.api.outputs import LossOutput, TokenObservations, TokenStats
from unirl_kernels.api.rows import per_row, program_args, readout_args
from unirl_kernels.backends import COMPOSED, choose
from unirl_kernels.backends.groups import ReadoutArgs, row_dtype
from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators.autograd import OnePass, Statistics
from unirl_kernels.operators.shards import ROW_OBSERVATIONS, ROW_STATISTICS, ShardArgs
from unirl_kernels.plan import Plan
from unirl_kernels.ranks.shard import VocabShard
from unirl_kernels.readout import Readout


def token_stats(
    logits: Tensor,  # [B, L, V] or [T, V]
    target: Tensor,  # [B, L] or [T]
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
    shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of each token's row, in one read of the logits.

        lse = log sum_j e^{z_j}        logp = z_y - lse        H = lse - sum_j p_j z_j,        p = softmax(z)

    Replaces ``log_softmax`` + ``gather`` and the entropy of the policy. All three have gradients.

    Args:
        logits: [B, L, V] or [T, V]; float32, bfloat16 or float16 (float64 for checks), last dimension contiguous.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a row is not read and gets zero gradient.
        readout: how logits become a distribution.
        plan: how the machine computes it.
        shard: the columns of this rank, if the vocabulary is split over a process group. The statistics are those of
            the whole rows. Logits that are a DTensor with placement ``Shard(-1)`` need no ``shard``.

    Returns:
        ``TokenStats``.

    Raises:
        TypeError: when an argument has a wrong type or dtype. The message names the argument, the expected and the
            actual value.
        ValueError: when an argument has a wrong shape, device or value, with a message of the same form.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.

    Examples:
        >>> logits = torch.zeros(1, 2, 4, requires_grad=True)  # p = 1/4 everywhere
        >>> stats = uk.token_stats(logits, torch.tensor([[3, uk.IGNORE]]))
        >>> stats.logp.detach()
        tensor([[-1.3863,  0.0000]])
        >>> stats.logp.sum().backward()
        >>> logits.grad[0, 0]
        tensor([-0.2500, -0.2500, -0.2500,  0.7500])
    """
    given = Given(ROW_STATISTICS, target, readout, plan, shard)
    return TokenStats(*_measured(*_checked(logits, given), given))


def token_observations(
    logits: Tensor,  # [B, L, V] or [T, V]
    target: Tensor,  # [B, L] or [T]
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
    shard: VocabShard | None = None,
) -> TokenObservations:
    """``token_stats``, and also log sum p^2, the mean logit and the argmax, from the same read of the logits.

        log_sum_sq_probs = log sum_j p_j^2        mean_logit = 1/V sum_j z_j        argmax = min argmax_j z_j

    Trainers log these values. logp, entropy and lse have gradients, the other three do not.

    Args:
        logits: as in ``token_stats``.
        target: as in ``token_stats``. A row whose target is outside the vocabulary has argmax -1.
        readout: how logits become a distribution.
        plan: how the machine computes it.
        shard: as in ``token_stats``.

    Returns:
        ``TokenObservations``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_stats`` does.

    Examples:
        >>> logits = torch.tensor([[[0.0, 3.0, 1.0]]])
        >>> seen = uk.token_observations(logits, torch.tensor([[2]]))
        >>> seen.argmax, seen.mean_logit
        (tensor([[1]]), tensor([[1.3333]]))
    """
    given = Given(ROW_OBSERVATIONS, target, readout, plan, shard)
    return TokenObservations.of_rows(_measured(*_checked(logits, given), given))


def fused_loss(
    logits: Tensor,  # [B, L, V] or [T, V]
    batch: Batch,
    loss: Loss,
    *,
    readout: Readout = Readout(),
    plan: Plan = Plan(),
    shard: VocabShard | None = None,
) -> LossOutput:
    """The loss of a batch and the gradient of its logits, in one pass over the logits.

        L = sum_t w_t f(t)
        dL/dz_j = w_t (f_logp (1[j = y] - p_j) + f_lse p_j - f_H p_j (log p_j + H))

    f is the objective, f_x = df/dx, and w_t is the weight that the aggregation gives to token t. z are the logits of
    the token after the readout, p = softmax(z), y is the target and H the entropy.

    A loss of token scope reads the logits once and writes their gradient once. A loss of a wider scope takes two
    passes: the forward computes the statistics, ``backward`` computes the gradient. fp16 logits also take two passes,
    unless ``plan`` names a kernel: their gradient must be multiplied by the loss scale before it is rounded.

    Args:
        logits: [B, L, V] or [T, V], in the layout of ``batch.target``; float32, bfloat16 or float16 (float64 for
            checks), last dimension contiguous.
        batch: targets, and the fields that the objective reads.
        loss: an objective and its aggregation, or a sum of losses.
        readout: how logits become a distribution.
        plan: how the machine computes it.
        shard: the columns of this rank, as in ``token_stats``. The loss then takes two passes, and is the same on all
            ranks.

    Returns:
        ``LossOutput``. Its ``loss`` is differentiable in the logits. In one pass, the forward computes the gradient,
        and ``backward`` multiplies it by the upstream gradient.

    Raises:
        TypeError: when an argument has a wrong type or dtype. The message names the argument, the expected and the
            actual value. Also when the objective uses an operation that the kernel cannot run
            (``UnsupportedOperation``).
        ValueError: when an argument has a wrong shape, device or value, with a message of the same form. Also when the
            objective reads a field that the batch does not have.
        IndexError: when a target is outside the vocabulary (on the CPU; on an accelerator its row becomes NaN).
        RuntimeError: when the named backend cannot run here.

    Examples:
        >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
        >>> batch = uk.Batch(torch.tensor([[3, uk.IGNORE]]), advantage=torch.tensor([2.0]))
        >>> out = uk.fused_loss(logits, batch, uk.ppo(clip=0.2))
        >>> out.loss.backward()
        >>> logits.grad[0, 0]  # -2 (1[j = 3] - 1/4)
        tensor([ 0.5000,  0.5000,  0.5000, -1.5000])
    """
    given = Given(ROW_STATISTICS, target_of(batch), readout, plan, shard, (batch, loss))
    logits, of_readout, split = _checked(logits, given)
    if split is None:
        choice = kernel_of(loss, plan, logits.device, logits.dtype, logits.shape[-1])
        # An fp16 gradient is formed in the backward, with the loss scale of the upstream one: 1e-8 would round to 0.
        waits = logits.dtype == torch.float16 and plan.kernel is None
        if choice.kernel != COMPOSED and wants_gradient(logits) and not waits:
            program = program_args(loss, batch, row_dtype(logits.dtype))
            of_rows = (per_row(batch.target), of_readout, program)
            value, *stats = OnePass.apply(logits, *of_rows, choice.backend, choice.kernel, plan.overwrite_logits)
            return LossOutput.of(value, stats, batch, loss)
    stats = _measured(logits, of_readout, split, given)
    return LossOutput.of(loss.composed(Tokens(batch, *stats), loss.weights(batch)), stats, batch, loss)


def _checked(logits: Tensor, given: Given) -> tuple[Tensor, ReadoutArgs, ShardArgs | None]:
    """Checked logits, readout and shard. With a shard, the arguments were also compared with those of other ranks."""
    logits, shard = shard_of_logits(logits, given.shard)
    if shard is None:
        return logits, _readout(logits, given, None), None
    check_kind("shard", shard, VocabShard)

    def check() -> tuple[ReadoutArgs, Brought]:
        readout, columns = _readout(logits, given, shard), logits.shape[-1]
        check_split(shard, columns, given, logits.device)
        return readout, Brought(columns)

    own = {"operand": getattr(logits, "dtype", None)}
    readout, of_shard, _ = agreed(shard, logits, given, own, check)
    return logits, readout, of_shard


def _readout(logits: Tensor, given: Given, shard: VocabShard | None) -> ReadoutArgs:
    """The readout of logits; raises if the arguments do not fit together."""
    given.check_kinds()
    check_logits(logits, given.target, shard)
    if given.plan.overwrite_logits and wants_gradient(logits):
        check_overwritable(logits)
    return readout_args(given.readout, given.target, row_dtype(logits.dtype), given.batch)


def _measured(logits: Tensor, readout: ReadoutArgs, shard: ShardArgs | None, given: Given) -> list[Tensor]:
    """The results of the operators for each row, in target's shape."""
    target, plan = given.target, given.plan
    backend = choose(logits.device, plan.backend, plan.kernel).backend
    of_rows = (per_row(target), readout, backend, given.operators)
    if shard is None and not wants_gradient(logits):
        found = Statistics.without_gradient(logits, *of_rows)
    else:
        found = Statistics.apply(logits, *of_rows, plan.overwrite_logits, shard)
    return [x.view(target.shape) for x in found]
