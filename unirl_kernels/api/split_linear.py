"""Levels 1 and 2 on linear heads whose weight is split over a process group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.api.agreement import Brought, LossArgs, agreed
from unirl_kernels.api.arguments import check_kinds, check_shard_of_head
from unirl_kernels.api.outputs import LossOutput
from unirl_kernels.api.rows import as_rows, readout_args, sweep_args
from unirl_kernels.api.split import check_composed, check_shard, check_tiles, compared
from unirl_kernels.backends import ReadoutArgs, row_dtype
from unirl_kernels.batch import Batch
from unirl_kernels.checks import has_values
from unirl_kernels.collectives import Gathered, SumGradient
from unirl_kernels.head import ComposedLinear, Composition, Head, Rows, by_units, rows_per_chunk
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.linear import HeadArgs, SweepArgs, Wanted, linear_shard_moments
from unirl_kernels.operators.linear_autograd import LinearStatistics
from unirl_kernels.operators.shards import ShardArgs
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout
from unirl_kernels.shard import VocabShard


class SplitHead(NamedTuple):
    """A head of which this rank has a shard, checked, without padding, and what all ranks agree on."""

    head: HeadArgs  # hidden [T, D], or this rank's part of it
    sweep: SweepArgs
    readout: ReadoutArgs
    shard: ShardArgs
    row_bytes: int  # of the widest shard


def measured_shard(
    operator: Operator,
    head: HeadArgs,
    target: Tensor,
    readout: Readout,
    plan: Plan,
    shard: VocabShard,
) -> list[Tensor]:
    """What an operator on a shard of a head finds in each row, in target's shape."""
    split = _agreed(operator, head, target, readout, plan, shard)
    return _measured(operator, split, target, shard)


def fused_shard(
    head: HeadArgs,
    batch: Batch,
    loss: Loss,
    readout: Readout,
    plan: Plan,
    shard: VocabShard,
) -> LossOutput:
    """``fused_linear_loss`` of a shard: three matmuls if each unit of the loss fits a chunk of the widest shard."""
    of_loss = LossArgs(batch, loss)
    split = _agreed(linear_shard_moments, head, of_loss.target, readout, plan, shard, of_loss)
    found = _in_chunks(split, batch, loss, shard)
    if found is None:
        stats = _measured(linear_shard_moments, split, batch.target, shard)
        value = loss.composed(Tokens(batch, *stats), loss.weights(batch))
    else:
        value, *stats = found
    return LossOutput.of(value, stats, batch, loss)


def _in_chunks(split: SplitHead, batch: Batch, loss: Loss, shard: VocabShard) -> tuple[Tensor, ...] | None:
    """Loss and statistics with the gradients made in the same pass; None where that cannot be, or none is wanted."""
    if not any(_wanted(split.head)) or torch.compiler.is_compiling() or not has_values(batch.target):
        return None
    if any(x.requires_grad for x in batch.fields.values()):
        return None
    bytes_of_chunk = split.sweep.max_chunk_bytes
    most = rows_per_chunk(split.row_bytes, batch.target.device, bytes_of_chunk)
    groups = by_units(batch, loss.scope, most)
    if groups is None:
        return None
    head = split.head
    if shard.parts > 1:
        head = head._replace(hidden=_gathered(head.hidden, shard))
    rows = Rows(split.sweep.backend, split.shard, shard.hidden == "whole")
    composition = Composition(batch, loss, groups, split.readout, rows)
    found: tuple[Tensor, ...] = ComposedLinear.apply(*_flat(head), composition, split.sweep)
    return found


def _measured(operator: Operator, split: SplitHead, target: Tensor, shard: VocabShard) -> list[Tensor]:
    head = split.head
    if shard.parts > 1:
        head = head._replace(hidden=_gathered(head.hidden, shard))
    elif shard.hidden == "whole" and head.hidden.requires_grad:
        head = head._replace(hidden=SumGradient.apply(head.hidden, shard.ranks, row_dtype(head.hidden.dtype)))
    found = LinearStatistics.apply(*_flat(head), as_rows(target), split.readout, split.sweep, operator, split.shard)
    return [x.view(target.shape) for x in found]


def _gathered(hidden: Tensor, shard: VocabShard) -> Tensor:
    """[B, L, D] of the ranks' [B, L / n, D] or, with FSDP2, [B / n, L, D]; [T, D] of [T / n, D]."""
    dtype = row_dtype(hidden.dtype)
    if shard.hidden == "fsdp":
        return Gathered.apply(hidden, shard.ranks, dtype, shard.ranks.size)  # type: ignore[no-any-return]
    by_position = hidden.movedim(-2, 0)
    whole: Tensor = Gathered.apply(by_position, shard.ranks, dtype, 1)
    return whole.movedim(0, -2)


def _flat(head: HeadArgs) -> HeadArgs:
    return head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1]))


def _wanted(head: HeadArgs) -> Wanted:
    return Wanted(*(torch.is_grad_enabled() and x is not None and x.requires_grad for x in head))


def _agreed(
    operator: Operator,
    head: HeadArgs,
    target: Tensor,
    readout: Readout,
    plan: Plan,
    shard: VocabShard,
    of_loss: LossArgs | None = None,
) -> SplitHead:
    """Check the arguments, compare them with those of the other ranks, and leave out the padding."""
    check_shard(shard)
    found: list[tuple[SweepArgs, ReadoutArgs]] = []
    batch = None if of_loss is None else of_loss.batch

    def check() -> Brought:
        check_kinds(**({} if of_loss is None else of_loss._asdict()), readout=readout, plan=plan)
        check_shard_of_head(*head, target, shard.parts, 0 if shard.hidden == "fsdp" else -1)
        if of_loss is not None:
            check_composed(plan, head.hidden.device)
            of_loss.loss.check_scopes()
            if shard.hidden == "fsdp":
                _check_pairs(of_loss)
        sweep = sweep_args(*head, plan)
        found.append((sweep, readout_args(readout, target, row_dtype(sweep.dtype), batch)))
        columns = head.weight.shape[0]
        check_tiles(shard, columns, operator)
        row_bytes = 0 if torch.compiler.is_compiling() else _row_bytes(head, shard.used(columns), sweep)
        wants = sum(2**k * wanted for k, wanted in enumerate(_wanted(head)))
        return Brought(columns, row_bytes, wants, sweep.max_chunk_bytes)

    arguments = compared(operator, of_loss, readout) | {"hidden": shard.hidden, "operand": _kind_of(head)}
    of_shard, row_bytes = agreed(shard, head.hidden, target, check, arguments, waits=True)
    used = head
    if of_shard.columns < head.weight.shape[0]:
        bias = None if head.bias is None else head.bias[: of_shard.columns]
        used = head._replace(weight=head.weight[: of_shard.columns], bias=bias)
    return SplitHead(used, *found[0], of_shard, row_bytes)


def _check_pairs(of_loss: LossArgs) -> None:
    """Raise a ``ValueError`` for pairs in halves: the sequences of one rank follow those of another."""
    if of_loss.loss.scope in ("pair", "batch") and of_loss.batch.pairs == "halves":
        raise ValueError("batch.pairs must be 'interleaved' for a shard of FSDP2 and a loss of pairs, got 'halves'")


def _kind_of(head: HeadArgs) -> str:
    """Size and dtype of hidden states, which may be no tensors, and whether there is a bias."""
    shape = getattr(head.hidden, "shape", None)
    size = shape[-1] if shape else 0
    bias = "without" if head.bias is None else "with"
    return f"hidden of D = {size}, {getattr(head.hidden, 'dtype', None)}, {bias} a bias"


def _row_bytes(head: HeadArgs, columns: int, sweep: SweepArgs) -> int:
    """Memory for the logits of one token, and for what is made of them, of this rank."""
    used = head.weight.detach()[:columns]
    return Head(head.hidden, used, None, sweep.dtype, sweep.backend).matmuls.row_bytes
