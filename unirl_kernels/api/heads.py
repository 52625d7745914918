"""Checks a linear head, and converts it to the form that operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.api.agreement import Brought, agreed
from unirl_kernels.api.arguments import Given, check_head, check_kind, check_split
from unirl_kernels.api.dtensors import shard_of_head
from unirl_kernels.api.rows import readout_args, sweep_args
from unirl_kernels.backends.groups import ReadoutArgs, row_dtype
from unirl_kernels.head import Head
from unirl_kernels.head.chunks import rows_per_chunk
from unirl_kernels.operators.linear import HeadArgs, SweepArgs, Wanted
from unirl_kernels.operators.shards import ShardArgs
from unirl_kernels.ranks.collectives import Gathered
from unirl_kernels.ranks.shard import VocabShard


class CheckedHead(NamedTuple):
    """A checked head. With a shard, its arguments were also compared with those of the other ranks.

    Hidden states are those of all tokens, and the weight has no padding.
    """

    head: HeadArgs
    readout: ReadoutArgs
    sweep: SweepArgs
    shard: ShardArgs | None = None
    sums: bool = False  # whether the gradient of hidden is to be summed over the ranks
    row_bytes: int | None = None  # bytes of a token's logits in the widest shard; None: those of this head


def checked_head(head: HeadArgs, given: Given) -> CheckedHead:
    head, shard = shard_of_head(head, given.shard)
    if shard is None:
        readout, sweep = _sweep(head, given, None)
        return CheckedHead(_flat(head), readout, sweep)
    check_kind("shard", shard, VocabShard)

    def check() -> tuple[tuple[ReadoutArgs, SweepArgs], Brought]:
        found = _sweep(head, given, shard)
        return found, _brought(head, found[1], shard, given)

    own = {"hidden": shard.hidden, "operand": _kind_of(head)}
    found, of_shard, row_bytes = agreed(shard, head.hidden, given, own, check, waits=True)
    if row_bytes:  # else compiled code
        rows_per_chunk(row_bytes, head.hidden.device, found[1].max_chunk_bytes)  # raise on all ranks
    used = head
    if shard.parts > 1:
        used = used._replace(hidden=_gathered(head.hidden, shard))
    if of_shard.columns < head.weight.shape[0]:
        bias = None if head.bias is None else head.bias[: of_shard.columns]
        used = used._replace(weight=head.weight[: of_shard.columns], bias=bias)
    return CheckedHead(_flat(used), *found, of_shard, shard.hidden == "whole", row_bytes)


def _sweep(head: HeadArgs, given: Given, shard: VocabShard | None) -> tuple[ReadoutArgs, SweepArgs]:
    """The readout of a head, and how its logits are computed; raises if the arguments do not fit together."""
    given.check_kinds()
    check_head(head, given.target, shard)
    sweep = sweep_args(*head, given.plan)
    return readout_args(given.readout, given.target, row_dtype(sweep.dtype), given.batch), sweep


def _brought(head: HeadArgs, sweep: SweepArgs, shard: VocabShard, given: Given) -> Brought:
    """Checks that only shards need, and this rank's values for the exchange."""
    columns = head.weight.shape[0]
    check_split(shard, columns, given, head.hidden.device)
    if given.of_loss is not None:
        batch, loss = given.of_loss
        loss.check_scopes()
        # With pairs in halves, gathering the ranks' sequences one after another would mix up chosen and rejected.
        if shard.hidden == "fsdp" and loss.scope in ("pair", "batch") and batch.pairs == "halves":
            raise ValueError("batch.pairs must be 'interleaved' for a shard of FSDP2 and a loss of pairs, got 'halves'")
    row_bytes = 0
    if not torch.compiler.is_compiling():
        used = head._replace(weight=head.weight.detach()[: shard.used(columns)], bias=None)
        row_bytes = Head.of(used, sweep).row_bytes
    wants = sum(2**k * wanted for k, wanted in enumerate(wanted_of(head)))
    return Brought(columns, row_bytes, wants, sweep.max_chunk_bytes)


def _kind_of(head: HeadArgs) -> str:
    """Size and dtype of hidden states, which may be no tensor yet, and whether there is a bias."""
    shape = getattr(head.hidden, "shape", None)
    size = shape[-1] if shape else 0
    bias = "without" if head.bias is None else "with"
    return f"hidden of D = {size}, {getattr(head.hidden, 'dtype', None)}, {bias} a bias"


def _gathered(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Gather [B, L, D] from the ranks' [B, L / n, D], or with FSDP2 [B / n, L, D]; [T, D] from [T / n, D]."""
    dtype = row_dtype(hidden.dtype)
    if shard.hidden == "fsdp":
        return Gathered.apply(hidden, shard.ranks, dtype, shard.ranks.size)  # type: ignore[no-any-return]
    whole: Tensor = Gathered.apply(hidden.movedim(-2, 0), shard.ranks, dtype, 1)
    return whole.movedim(0, -2)


def _flat(head: HeadArgs) -> HeadArgs:
    """The head with hidden states [T, D]."""
    return HeadArgs(head.hidden.reshape(-1, head.hidden.shape[-1]), head.weight, head.bias)


def wanted_of(head: HeadArgs) -> Wanted:
    if not torch.is_grad_enabled():
        return Wanted(False, False, False)
    bias = head.bias is not None and head.bias.requires_grad
    return Wanted(head.hidden.requires_grad, head.weight.requires_grad, bias)
