"""Levels 1 and 2 on hidden states and the weight of a linear head: the logits exist in chunks only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unirl_kernels.api.arguments import check_head, check_kinds, kernel_of
from unirl_kernels.api.dtensors import shard_of_head
from unirl_kernels.api.outputs import LossOutput, TokenObservations, TokenStats
from unirl_kernels.api.rows import as_rows, program_args, readout_args, sweep_args
from unirl_kernels.api.split_linear import fused_shard, measured_shard
from unirl_kernels.backends import COMPOSED, row_dtype
from unirl_kernels.batch import Batch
from unirl_kernels.checks import has_values
from unirl_kernels.head import (
    ComposedLinear,
    Composition,
    Group,
    Head,
    ObservedRows,
    Rows,
    by_units,
    observations,
)
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators import linear
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.linear import HeadArgs, SweepArgs, Wanted
from unirl_kernels.operators.linear_autograd import LinearStatistics, OnePassLinear
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout
from unirl_kernels.shard import VocabShard


def linear_token_stats(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [B, L] or [T]
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
    shard: VocabShard | None = None,
) -> TokenStats:
    """``token_stats`` of the logits hidden W^T + b, without a tensor of all logits.

        lse = log sum_j e^{z_j}        logp = z_y - lse        H = lse - sum_j p_j z_j,        p = softmax(z)

    The forward takes one matmul, in tiles of tokens by vocabulary that are not kept. The backward computes the logits
    again and takes three.

    Args:
        hidden: [B, L, D] or [T, D]; float32, bfloat16 or float16 (float64 for checks). Under autocast the operands of
            the matmuls have its dtype. The logits are always float32.
        weight: [V, D], of hidden's dtype.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a token is left out of the matmuls and gets zero
            gradient.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.
        shard: the rows of the weight, and of the bias, that this rank has, where the vocabulary is split over a process
            group. A weight that is a DTensor of placement ``Shard(0)`` gives it by itself if hidden is a DTensor that
            is replicated on the same mesh dimension. The statistics are those of the whole vocabulary.

    Returns:
        ``TokenStats``, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_stats`` does.

    Examples:
        >>> hidden, weight = torch.ones(1, 2, 3), torch.zeros(4, 3)  # B = 1, L = 2, D = 3, V = 4
        >>> uk.linear_token_stats(hidden, weight, torch.tensor([[3, uk.IGNORE]])).logp
        tensor([[-1.3863,  0.0000]])
    """
    head, shard = shard_of_head(HeadArgs(hidden, weight, bias), shard)
    if shard is not None:
        found = measured_shard(linear.linear_shard_moments, head, target, readout, plan, shard)
        return TokenStats(*found)
    found = _measured(linear.linear_token_stats, hidden, weight, bias, target, readout, plan)
    return TokenStats(*found)


def linear_token_observations(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [B, L] or [T]
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
    shard: VocabShard | None = None,
) -> TokenObservations:
    """``token_observations`` of the logits hidden W^T + b, without a tensor of all logits.

        log_sum_sq_probs = log sum_j p_j^2        mean_logit = 1/V sum_j z_j        argmax = min argmax_j z_j

    It costs what ``linear_token_stats`` costs. Where two logits are equal but for rounding, the matmul's rounding
    decides which is the argmax.

    Args:
        hidden: as in ``linear_token_stats``.
        weight: [V, D], of hidden's dtype.
        target: as in ``linear_token_stats``.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.
        shard: as in ``linear_token_stats``.

    Returns:
        ``TokenObservations``; logp, entropy and lse are differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_stats`` does.

    Examples:
        >>> hidden, weight = torch.ones(1, 2, 3), torch.eye(4, 3)
        >>> bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
        >>> uk.linear_token_observations(hidden, weight, torch.tensor([[3, 1]]), bias=bias).argmax
        tensor([[3, 3]])
    """
    head, shard = shard_of_head(HeadArgs(hidden, weight, bias), shard)
    if shard is not None:
        found = measured_shard(linear.linear_shard_observations, head, target, readout, plan, shard)
        return TokenObservations.of_rows(found)
    found = _measured(linear.linear_token_observations, hidden, weight, bias, target, readout, plan)
    return TokenObservations.of_rows(found)


def _measured(
    operator: Operator,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    readout: Readout,
    plan: Plan,
    batch: Batch | None = None,
) -> list[Tensor]:
    """What an operator finds in each row, in target's shape."""
    check_kinds(readout=readout, plan=plan)
    check_head(hidden, weight, bias, target)
    sweep = sweep_args(hidden, weight, bias, plan)
    of_readout = readout_args(readout, target, row_dtype(sweep.dtype), batch)
    found = LinearStatistics.apply(_flat(hidden), weight, bias, as_rows(target), of_readout, sweep, operator, None)
    return [x.view(target.shape) for x in found]


def fused_linear_loss(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    batch: Batch,
    loss: Loss,
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
    shard: VocabShard | None = None,
) -> LossOutput:
    """``fused_loss`` of the logits hidden W^T + b, without a tensor of all logits.

    The batch is cut into chunks of tokens. The logits of a chunk are computed in float32, one pass replaces them by
    their gradient, and the gradients of hidden, weight and bias are formed from that. This takes three matmuls.

    A loss of a wider scope takes three matmuls if each of its units (a sequence, a pair, the whole batch) fits a chunk.
    Otherwise, and under ``torch.compile``, it takes four: the statistics come first. ``explain`` says which. Gradients
    that nothing requires are not computed.

    Args:
        hidden: [B, L, D] or [T, D], in the layout of ``batch.target``; float32, bfloat16 or float16 (float64 for
            checks). Under autocast the operands of the matmuls have its dtype. The logits, and the sum of the weight's
            gradient over the chunks, are always float32.
        weight: [V, D], of hidden's dtype.
        batch: targets, and the fields that the objective reads. Ignored tokens are left out of the matmuls.
        loss: an objective and its aggregation, or a sum of losses.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.
        shard: as in ``linear_token_stats``. The loss is the same on all ranks.

    Returns:
        ``LossOutput``. Its ``loss`` is differentiable in hidden, weight and bias.

    Raises:
        TypeError, IndexError, RuntimeError: as ``fused_loss`` does.
        ValueError: as ``fused_loss`` does, and when an objective looks further than its scope says.

    Examples:
        >>> hidden = torch.ones(1, 2, 3)
        >>> weight = torch.zeros(4, 3, requires_grad=True)
        >>> out = uk.fused_linear_loss(hidden, weight, uk.Batch(torch.tensor([[3, uk.IGNORE]])), uk.sft())
        >>> out.loss.backward()
        >>> weight.grad[:, 0]
        tensor([ 0.2500,  0.2500,  0.2500, -0.7500])
    """
    operands, shard = shard_of_head(HeadArgs(hidden, weight, bias), shard)
    if shard is not None:
        return fused_shard(operands, batch, loss, readout, plan, shard)
    check_kinds(batch=batch, loss=loss, readout=readout, plan=plan)
    check_head(hidden, weight, bias, batch.target)
    head, sweep = HeadArgs(_flat(hidden), weight, bias), sweep_args(hidden, weight, bias, plan)
    choice = kernel_of(loss, plan, hidden.device, row_dtype(sweep.dtype), weight.shape[0])
    if choice.kernel == COMPOSED:
        loss.check_scopes()
    wanted = Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in head))
    dtype = row_dtype(sweep.dtype)
    found: Sequence[Tensor] | None = None
    if any(wanted):
        of_readout = readout_args(readout, batch.target, dtype, batch)
        if choice.kernel != COMPOSED:
            program, sweep = program_args(loss, batch, dtype), sweep._replace(backend=choice.backend)
            target = as_rows(batch.target)
            found = OnePassLinear.apply(*head, target, of_readout, program, choice.kernel, sweep, wanted)
        elif (groups := _groups(head, sweep, batch, loss)) is not None:
            composition = Composition(batch, loss, groups, of_readout, Rows(sweep.backend))
            found = ComposedLinear.apply(*head, composition, sweep)
    if found is not None:
        value, *stats = found
        return LossOutput.of(value, stats, batch, loss)
    stats = _measured(linear.linear_token_stats, hidden, weight, bias, batch.target, readout, plan, batch)
    value = loss.composed(Tokens(batch, *stats), loss.weights(batch))
    return LossOutput.of(value, stats, batch, loss)


def observed_linear_loss(
    hidden: Tensor,  # [B, L, D] or [T, D]
    weight: Tensor,  # [V, D]
    batch: Batch,
    loss: Loss,
    *,
    bias: Tensor | None = None,  # [V]
    readout: Readout = Readout(),
    plan: Plan = Plan(),
) -> tuple[LossOutput, TokenObservations]:
    """``fused_linear_loss``, and ``linear_token_observations`` of the logits that gave it.

    Three matmuls where ``fused_linear_loss`` takes three for a composed loss: kernels of one pass observe nothing.

    Args:
        hidden, weight, batch, loss, bias, readout, plan: as in ``fused_linear_loss``.

    Returns:
        ``LossOutput``, and ``TokenObservations`` without a gradient.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``fused_linear_loss`` does.
    """
    check_kinds(batch=batch, loss=loss, readout=readout, plan=plan)
    check_head(hidden, weight, bias, batch.target)
    loss.check_scopes()
    head, sweep = HeadArgs(_flat(hidden), weight, bias), sweep_args(hidden, weight, bias, plan)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head)
    if wanted and (groups := _groups(head, sweep, batch, loss)) is not None:
        of_readout = readout_args(readout, batch.target, row_dtype(sweep.dtype), batch)
        composition = Composition(batch, loss, groups, of_readout, ObservedRows(sweep.backend))
        value, *stats = ComposedLinear.apply(*head, composition, sweep)
        seen: Sequence[Tensor] = (*stats, *observations(composition))
    else:
        seen = _measured(linear.linear_token_observations, hidden, weight, bias, batch.target, readout, plan, batch)
        value = loss.composed(Tokens(batch, *seen[:3]), loss.weights(batch))
    found = TokenObservations.of_rows([x.detach().view(batch.target.shape) for x in seen])
    return LossOutput.of(value, found[:3], batch, loss), found


def _groups(head: HeadArgs, sweep: SweepArgs, batch: Batch, loss: Loss) -> Sequence[Group] | None:
    """What to work on together; None where that cannot be, and the statistics of all tokens have to come first."""
    # A compiler cannot follow an objective inside an autograd function; without values there are no lengths.
    if torch.compiler.is_compiling() or not has_values(head.hidden):
        return None
    if any(x.requires_grad for x in batch.fields.values()):  # their gradients come from the loss as a whole
        return None
    return by_units(batch, loss.scope, Head.of(head, sweep).rows_per_chunk(sweep.max_chunk_bytes))


def _flat(hidden: Tensor) -> Tensor:
    """[T, D] of either layout."""
    return hidden.reshape(-1, hidden.shape[-1])
