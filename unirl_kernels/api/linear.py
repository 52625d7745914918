"""Levels 1 and 2 on hidden states and the weight of a linear head. Logits are computed in chunks and never kept."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.api.arguments import Given, kernel_of, target_of
from unirl_kernels.api.heads import CheckedHead, checked_head, wanted_of
from unirl_kernels.api.outputs import LossOutput, TokenObservations, TokenStats
from unirl_kernels.api.rows import per_row, program_args
from unirl_kernels.backends import COMPOSED
from unirl_kernels.backends.groups import row_dtype
from unirl_kernels.batch import Batch
from unirl_kernels.checks import has_values
from unirl_kernels.head import ComposedLinear, Composition, Head, by_units, rows_per_chunk
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators.autograd import has_tangent
from unirl_kernels.operators.linear import LINEAR_OBSERVATIONS, LINEAR_STATISTICS, HeadArgs
from unirl_kernels.operators.linear_autograd import LinearStatistics, OnePassLinear
from unirl_kernels.plan import Plan
from unirl_kernels.ranks.collectives import SumGradient
from unirl_kernels.ranks.shard import VocabShard
from unirl_kernels.readout import Readout


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
    again, and takes three matmuls.

    Args:
        hidden: [B, L, D] or [T, D]; float32, bfloat16 or float16 (float64 for checks). Under autocast the operands of
            the matmuls have the autocast dtype. The logits are always float32.
        weight: [V, D], of hidden's dtype.
        target: [B, L] or [T] int64 in [0, V), or ``IGNORE``: such a token takes no part in the matmuls and gets zero
            gradient.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.
        shard: the rows of weight and bias that this rank holds, if the vocabulary is split over a process group. The
            statistics are those of the whole vocabulary. A weight that is a DTensor with placement ``Shard(0)`` needs
            no ``shard`` if hidden is a DTensor that is replicated on the same mesh dimension.

    Returns:
        ``TokenStats``, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_stats`` does.

    Examples:
        >>> hidden, weight = torch.ones(1, 2, 3), torch.zeros(4, 3)  # B = 1, L = 2, D = 3, V = 4
        >>> uk.linear_token_stats(hidden, weight, torch.tensor([[3, uk.IGNORE]])).logp
        tensor([[-1.3863,  0.0000]])
    """
    given = Given(LINEAR_STATISTICS, target, readout, plan, shard)
    return TokenStats(*_measured(checked_head(HeadArgs(hidden, weight, bias), given), given))


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

    It costs as much as ``linear_token_stats``. If two logits differ only by rounding, the rounding of the matmul
    decides which one is the argmax.

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
    given = Given(LINEAR_OBSERVATIONS, target, readout, plan, shard)
    return TokenObservations.of_rows(_measured(checked_head(HeadArgs(hidden, weight, bias), given), given))


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

    The batch is cut into chunks of tokens. For each chunk, a matmul computes the logits in float32, one pass replaces
    them by their gradient, and two matmuls compute the gradients of hidden and weight from it. Together three matmuls.

    A loss of a wider scope takes three matmuls if each of its units (a sequence, a pair, the whole batch) fits a chunk.
    Otherwise, and under ``torch.compile``, it takes four: the statistics are computed first. ``explain`` tells which.
    Gradients that nobody requires are not computed.

    Args:
        hidden: [B, L, D] or [T, D], in the layout of ``batch.target``; float32, bfloat16 or float16 (float64 for
            checks). Under autocast the operands of the matmuls have the autocast dtype. The logits, and the sum of the
            weight's gradient over the chunks, are always float32.
        weight: [V, D], of hidden's dtype.
        batch: targets, and the fields that the objective reads. Ignored tokens take no part in the matmuls.
        loss: an objective and its aggregation, or a sum of losses.
        bias: [V], of weight's dtype, or None.
        readout: how logits become a distribution.
        plan: how the machine computes it; ``max_chunk_bytes`` bounds the memory for logits.
        shard: as in ``linear_token_stats``. The loss is the same on all ranks.

    Returns:
        ``LossOutput``. Its ``loss`` is differentiable in hidden, weight and bias.

    Raises:
        TypeError, IndexError, RuntimeError: as ``fused_loss`` does.
        ValueError: as ``fused_loss`` does, and when an objective depends on more tokens than its scope allows.

    Examples:
        >>> hidden = torch.ones(1, 2, 3)
        >>> weight = torch.zeros(4, 3, requires_grad=True)
        >>> out = uk.fused_linear_loss(hidden, weight, uk.Batch(torch.tensor([[3, uk.IGNORE]])), uk.sft())
        >>> out.loss.backward()
        >>> weight.grad[:, 0]
        tensor([ 0.2500,  0.2500,  0.2500, -0.7500])
    """
    given = Given(LINEAR_STATISTICS, target_of(batch), readout, plan, shard, (batch, loss))
    checked = checked_head(HeadArgs(hidden, weight, bias), given)
    if checked.shard is None:
        dtype = row_dtype(checked.sweep.dtype)
        choice = kernel_of(loss, plan, hidden.device, dtype, weight.shape[0])
        if choice.kernel != COMPOSED and any(wanted := wanted_of(checked.head)):
            of_rows = (per_row(batch.target), checked.readout, program_args(loss, batch, dtype))
            sweep = checked.sweep._replace(backend=choice.backend)
            value, *stats = OnePassLinear.apply(*checked.head, *of_rows, choice.kernel, sweep, wanted)
            return LossOutput.of(value, stats, batch, loss)
    value, *stats = _composed(checked, given, batch, loss)
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
    """``fused_linear_loss``, and ``linear_token_observations`` of the same logits.

    It takes three matmuls if ``fused_linear_loss`` takes three with ``kernel="composed"``: one-pass kernels do not
    compute observations.

    Args:
        hidden, weight, batch, loss, bias, readout, plan: as in ``fused_linear_loss``.

    Returns:
        ``LossOutput``, and ``TokenObservations`` without a gradient.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``fused_linear_loss`` does.
    """
    given = Given(LINEAR_OBSERVATIONS, target_of(batch), readout, plan, None, (batch, loss))
    checked = checked_head(HeadArgs(hidden, weight, bias), given)
    value, *rows = _composed(checked, given, batch, loss)
    seen = TokenObservations.of_rows([x.detach().view(batch.target.shape) for x in rows])
    return LossOutput.of(value, seen[:3], batch, loss), seen


def _measured(checked: CheckedHead, given: Given) -> list[Tensor]:
    """The results of the operators for each row, in target's shape."""
    head, readout, sweep, shard, sums, _ = checked
    if shard is not None and sums and wanted_of(head).hidden:
        hidden = SumGradient.apply(head.hidden, shard.ranks, row_dtype(head.hidden.dtype))
        head = head._replace(hidden=hidden)
    found = LinearStatistics.apply(*head, per_row(given.target), readout, sweep, given.operators, shard)
    return [x.view(given.target.shape) for x in found]


def _composed(checked: CheckedHead, given: Given, batch: Batch, loss: Loss) -> tuple[Tensor, ...]:
    """The loss and the results for each row: computed in chunks if possible, else all statistics first."""
    loss.check_scopes()
    found = _in_chunks(checked, batch, loss, given.operators is LINEAR_OBSERVATIONS)
    if found is None:
        rows = _measured(checked, given)
        found = loss.composed(Tokens(batch, *rows[:3]), loss.weights(batch)), *rows
    return found


def _in_chunks(checked: CheckedHead, batch: Batch, loss: Loss, observes: bool) -> tuple[Tensor, ...] | None:
    """Loss and rows, with the gradients computed in the same pass; None if no gradient is wanted or it is
    impossible."""
    head, readout, sweep, shard, sums, row_bytes = checked
    # torch.compile cannot trace an objective inside an autograd function. Without values the lengths are unknown.
    if not any(wanted_of(head)) or torch.compiler.is_compiling() or not has_values(head.hidden):
        return None
    # Gradients of fields need the whole loss under autograd.
    if any(x.requires_grad or has_tangent(x) for x in batch.given().values()):
        return None
    if row_bytes is None:
        row_bytes = Head.of(head, sweep).row_bytes
    parts = by_units(batch, loss.scope, rows_per_chunk(row_bytes, head.weight.device, sweep.max_chunk_bytes))
    if parts is None:
        return None
    composition = Composition(batch, loss, parts, readout, observes, shard, sums)
    found: tuple[Tensor, ...] = ComposedLinear.apply(*head, composition, sweep)
    return found
