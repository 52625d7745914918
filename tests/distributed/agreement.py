"""Arguments that differ on one rank: all ranks raise, and none hangs. Run by ``tests/distributed/shards.py``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.distributed.split import CASES, WIDTHS, columns_of, make, shard_of
from tests.distributed.split_heads import SHAPE
from tests.linear import SequenceRatio, make_head

ON_ALL = "must be the same on all ranks of shard.group, got "


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def refused_by_last(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    """The last rank raises its own error. The others raise one that says so."""
    if not is_last():
        kind, text = RuntimeError, f"rank {dist.get_world_size() - 1} of its group refuses its arguments"
    refused(text, call, kind)


def refused(text: str, call: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()


def calls() -> list[Callable[..., Any]]:
    """A loss of logits and one of a head; arguments take the place of good ones."""
    widths, rank = WIDTHS[dist.get_world_size()][0], dist.get_rank()
    shard = shard_of(widths, rank)
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    x = columns_of(logits, widths, rank).requires_grad_()
    head = make_head(SHAPE, BY_NAME["grpo"])
    operands = (head.hidden.clone().requires_grad_(), columns_of(head.weight, widths, rank, dim=0))

    def of_logits(batch: Any = batch, loss: Any = uk.grpo(), **others: Any) -> Any:
        return uk.fused_loss(x, batch, loss, shard=shard, **others)

    def of_head(batch: Any = head.batch, loss: Any = uk.grpo(), **others: Any) -> Any:
        return uk.fused_linear_loss(*operands, batch, loss, shard=shard, **others)

    return [of_logits, of_head]


def check_types() -> None:
    last = is_last()
    for call in calls():
        for name in ("batch", "loss", "readout", "plan"):
            wrong: dict[str, Any] = {name: None} if last else {}
            refused_by_last(TypeError, f"{name} must be a {name.title()}, got NoneType", lambda c=call, w=wrong: c(**w))
        call()


def scaled(factor: float) -> Callable[[Any], torch.Tensor]:
    return lambda t: factor * t.logp


def check_values() -> None:
    last, of_last = is_last(), f"on rank {dist.get_world_size() - 1}"
    for call in calls():
        for here, there, told in (
            (uk.grpo(), uk.grpo(clip=0.25), "surrogate.low=0.2 on rank 0 and"),
            (uk.dpo(), uk.dpo(0.5), f"beta=0.1 on rank 0 and terms[0].objective.beta=0.5 {of_last}"),
            (uk.grpo(), uk.Loss(uk.grpo().objective, uk.TokenMean()), f"aggregation=TokenMean {of_last}"),
            (uk.grpo(), uk.Loss(SequenceRatio()), "scope='token' on rank 0 and scope='sequence'"),
            (uk.sft(), 2.0 * uk.sft(), f"coefficient=2.0 {of_last}"),
        ):
            loss = there if last else here
            with pytest.raises(ValueError, match=f"^loss {re.escape(ON_ALL)}.*{re.escape(told)}"):
                call(loss=loss)
        readout = uk.Readout(temperature=0.5 if last else 1.0)
        text = f"readout {ON_ALL}temperature=1.0 on rank 0 and temperature=0.5 {of_last}"
        refused(text, lambda c=call, r=readout: c(readout=r))
        # Functions that compute the same are the same.
        call(loss=uk.Loss((lambda t: -0.5 * t.logp) if last else scaled(-0.5)))


def check_batches() -> None:
    last = is_last()
    for call, batch in zip(calls(), (make(CASES[0], BY_NAME["grpo"])[1], make_head(SHAPE, BY_NAME["grpo"]).batch)):  # noqa: B905
        assert batch.advantage is not None
        others = {
            "advantage=float32": {"advantage": batch.advantage + 1},
            "ref_logp=None": {"ref_logp": None},
            "fields.extra=float32 ()": {"fields": {"extra": torch.tensor(1.0)}},
            "old_logp=float64": {"old_logp": batch.old_logp.double()},
            "pairs='interleaved'": {"pairs": "interleaved"},
        }
        for told, change in others.items():
            given = replace(batch, **change) if last else batch
            with pytest.raises(ValueError, match=f"^batch {re.escape(ON_ALL)}.* and {re.escape(told)}"):
                call(batch=given)
        call(batch=batch)


def check_operands() -> None:
    """Differences that would change the sizes of exchanges."""
    widths, rank, last = WIDTHS[dist.get_world_size()][0], dist.get_rank(), is_last()
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    x, y, shard = columns_of(logits, widths, rank), batch.target, shard_of(widths, rank)
    function = uk.token_observations if last else uk.token_stats
    refused(
        f"the function that is called {ON_ALL}'token_stats without a loss' on rank 0",
        lambda: function(x, y, shard=shard),
    )
    wide = x.double() if last else x
    refused(f"the input {ON_ALL}torch.float32 on rank 0", lambda: uk.token_stats(wide, y, shard=shard))
    head = make_head(SHAPE, BY_NAME["grpo"])
    weight = columns_of(head.weight, widths, rank, dim=0)
    n = 4 if last else head.hidden.shape[-1]
    operands = (head.hidden[..., :n].contiguous(), weight[:, :n].contiguous(), head.batch.target)
    text = f"the input {ON_ALL}'hidden of D = {head.hidden.shape[-1]}, torch.float32, without a bias' on rank 0"
    refused(text, lambda: uk.linear_token_stats(*operands, shard=shard))
    part = shard_of(widths, rank, hidden="partial" if last else "whole")
    text = f"shard.hidden {ON_ALL}'whole' on rank 0 and 'partial'"
    refused(text, lambda: uk.linear_token_stats(head.hidden, weight, head.batch.target, shard=part))
    uk.token_stats(x, y, shard=shard)


def check_chunks() -> None:
    """Memory that is enough for the chunks of one rank, and not of another, whose shard is wider."""
    widths, rank = WIDTHS[dist.get_world_size()][1], dist.get_rank()
    head, shard = make_head(SHAPE, BY_NAME["grpo"]), shard_of(widths, rank)
    weight = columns_of(head.weight, widths, rank, dim=0)
    plan = uk.Plan(max_chunk_bytes=4 * (max(widths) - 1))
    for wanted in (False, True):
        operands = (head.hidden.detach().requires_grad_(wanted), weight)
        for call in (
            partial(uk.linear_token_stats, *operands, head.batch.target),
            partial(uk.linear_token_observations, *operands, head.batch.target),
            partial(uk.fused_linear_loss, *operands, head.batch, uk.grpo()),
        ):
            refused("max_chunk_bytes must hold the logits of one token", partial(call, plan=plan, shard=shard))


def check_all() -> None:
    check_types()
    check_values()
    check_batches()
    check_operands()
    check_chunks()
