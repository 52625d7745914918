"""Levels 1 and 2 on logits whose vocabulary is split over a process group."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.api.agreement import Brought, LossArgs, agreed
from unirl_kernels.api.arguments import check_kinds, check_overwritable, check_shard_of_logits, wants_gradient
from unirl_kernels.api.rows import as_rows, readout_args
from unirl_kernels.backends import COMPOSED, ReadoutArgs, choose, row_dtype
from unirl_kernels.operators.autograd import Statistics
from unirl_kernels.operators.declare import Operator
from unirl_kernels.operators.linear import linear_shard_moments
from unirl_kernels.operators.shards import shard_moments
from unirl_kernels.plan import Plan
from unirl_kernels.readout import Readout
from unirl_kernels.shard import VocabShard


def check_shard(shard: object) -> None:
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard, got {type(shard).__name__}")


def check_tiles(shard: VocabShard, columns: int, operator: Operator) -> None:
    """Raise a ``ValueError`` unless a shard's tiles are as many as each rank may have, and the operator takes tiles."""
    if shard.tiles is None:
        return
    if operator not in (shard_moments, linear_shard_moments):
        raise ValueError(f"shard.tiles must be None for observations, got {shard.tiles}")
    most = shard.slots * shard.tile
    if shard.used(columns) > most:
        raise ValueError(
            f"each of {shard.ranks.size} ranks must have at most {shard.slots} of {shard.tiles} tiles, {most} columns, "
            f"got {shard.used(columns)}"
        )


def measured_shard(
    operator: Operator,
    logits: Tensor,
    target: Tensor,
    readout: Readout,
    plan: Plan,
    shard: VocabShard,
    of_loss: LossArgs | None = None,
) -> list[Tensor]:
    """What an operator of ``operators/shards.py`` finds in each row, in target's shape."""
    check_shard(shard)
    batch = None if of_loss is None else of_loss.batch

    found: list[tuple[str, ReadoutArgs]] = []

    def check() -> Brought:
        check_kinds(**({} if of_loss is None else of_loss._asdict()), readout=readout, plan=plan)
        check_shard_of_logits(logits, target)
        of_readout = readout_args(readout, target, row_dtype(logits.dtype), batch)
        found.append((choose(logits.device, plan.backend, plan.kernel).backend, of_readout))
        if plan.overwrite_logits and wants_gradient(logits):
            check_overwritable(logits)
        if of_loss is not None:
            check_composed(plan, logits.device)
        check_tiles(shard, logits.shape[-1], operator)
        return Brought(logits.shape[-1])

    arguments = compared(operator, of_loss, readout) | {"operand": getattr(logits, "dtype", None)}
    of_shard, _ = agreed(shard, logits, target, check, arguments)
    ((backend, of_readout),) = found
    overwrites = plan.overwrite_logits and wants_gradient(logits)
    of_rows = Statistics.apply(logits, as_rows(target), of_readout, backend, operator, overwrites, of_shard)
    return [x.view(target.shape) for x in of_rows]


def compared(operator: Operator, of_loss: LossArgs | None, readout: Readout) -> dict[str, object]:
    """What logits and heads have to agree on alike."""
    call = f"{operator.name} {'without' if of_loss is None else 'for'} a loss"
    return {"call": call, "readout": readout} | ({} if of_loss is None else of_loss._asdict())


def check_composed(plan: Plan, device: torch.device) -> None:
    """Raise a ``ValueError`` where a one-pass kernel is named: no kernel sees a whole row."""
    choose(device, plan.backend, plan.kernel)
    if plan.kernel not in (None, COMPOSED):
        raise ValueError(f"kernel must be None or {COMPOSED!r} for a split vocabulary, got {plan.kernel!r}")
