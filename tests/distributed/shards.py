"""One of several processes that share a vocabulary: ``python -m tests.distributed.shards RANK FILE WORLD``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import unirl_kernels as uk
from tests.cases import BY_NAME
from tests.distributed import agreement as disagreements
from tests.distributed import dtensors, megatron, sequences, split_heads, tiles
from tests.distributed.split import (
    CASES,
    LOSSES,
    VOCAB,
    WIDTHS,
    Traffic,
    changed,
    columns_of,
    make,
    problems,
    same_bits,
    shard_of,
    split,
)
from unirl_kernels.api import agreement
from unirl_kernels.backends import unavailable
from unirl_kernels.operators import autograd, shards
from unirl_kernels.operators.shards import ShardArgs, Tiles
from unirl_kernels.testing.budgets import violations

RANK: int
WORLD: int
EAGER, CPU = uk.Plan(backend="eager"), uk.Plan()


def check_losses() -> None:
    """Every scope and layout, within the computed budget, and the same bits on every rank."""
    for i, case in enumerate(CASES):
        for k, widths in enumerate(WIDTHS[WORLD]):
            for loss in (LOSSES[(i + k) % 4], LOSSES[(i + k + 2) % 4]):
                logits, batch = make(case, loss)
                plan = (CPU, EAGER, uk.Plan(overwrite_logits=True))[k % 3]
                found = split(logits, batch, loss.make(), case.readout, widths, RANK, plan)
                own = partial(columns_of, widths=widths, rank=RANK)
                said = problems(found, case, logits, batch, loss.make(), own)
                assert not said, f"{case.shape} {widths} {loss} {plan}: {said}"
                assert all(same_bits(x) for x in (found.loss, found.logp, found.entropy, found.lse))


def check_triton() -> None:
    """The kernels of the Triton backend, in the interpreter, take shards."""
    if unavailable("triton", torch.device("cpu")):
        return
    case, widths, loss = CASES[0], WIDTHS[WORLD][1], BY_NAME["dpo"]
    logits, batch = make(case, loss)
    found = split(logits, batch, loss.make(), case.readout, widths, RANK, uk.Plan(backend="triton"))
    own = partial(columns_of, widths=widths, rank=RANK)
    assert not problems(found, case, logits, batch, loss.make(), own)


def check_statistics() -> None:
    """Level 1 with a gradient for each token and statistic, and the observations."""
    for case in CASES:
        for widths in WIDTHS[WORLD]:
            logits, batch = make(case, BY_NAME["sft"])
            weights = torch.randn(3, *batch.target.shape)
            x, part = logits.clone().requires_grad_(), columns_of(logits, widths, RANK).requires_grad_()
            shard = shard_of(widths, RANK)
            expected = uk.token_observations(x, batch.target, readout=case.readout)
            found = uk.token_observations(part, batch.target, readout=case.readout, shard=shard)
            stats = uk.token_stats(part, batch.target, readout=case.readout, shard=shard)
            assert all(torch.equal(a, b) for a, b in zip(stats, found[:3], strict=True))
            assert torch.equal(found.argmax, expected.argmax)
            for a, b in zip(found[:5], expected[:5], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            sum((w * s).sum() for w, s in zip(weights, expected[:3], strict=True)).backward()
            sum((w * s).sum() for w, s in zip(weights, found[:3], strict=True)).backward()
            eps = torch.finfo(logits.dtype).eps * 64
            close = {"rtol": eps, "atol": eps}
            torch.testing.assert_close(part.grad, columns_of(x.grad, widths, RANK, 0), **close)


def check_label_smoothing() -> None:
    """Label smoothing needs the mean of all logits: a mean over one rank's columns, or with padding, would differ."""
    case, epsilon = CASES[0], 0.1
    logits, batch = make(case, BY_NAME["sft"])
    used = batch.target != uk.IGNORE
    flat = (logits.flatten(0, 1), batch.target.flatten())
    how = {"ignore_index": uk.IGNORE, "label_smoothing": epsilon, "reduction": "none"}
    plain = torch.nn.functional.cross_entropy(*flat, **how)
    truth = torch.nn.functional.cross_entropy(flat[0].double(), flat[1], **how)
    weight = torch.randn(8, VOCAB)
    hidden = torch.linalg.lstsq(weight.double().t(), flat[0].double().t()).solution.t().float()
    of_head = torch.nn.functional.cross_entropy(hidden @ weight, flat[1], **how)
    of_head_truth = torch.nn.functional.cross_entropy(hidden.double() @ weight.double(), flat[1], **how)
    for widths in WIDTHS[WORLD]:
        shard = shard_of(widths, RANK)
        rows = columns_of(weight.t(), widths, RANK, dim=0)
        for seen, naive, exact in (
            (uk.token_observations(columns_of(logits, widths, RANK), batch.target, shard=shard), plain, truth),
            (
                uk.linear_token_observations(hidden.view(*used.shape, 8), rows, batch.target, shard=shard),
                of_head,
                of_head_truth,
            ),
        ):
            smooth = (epsilon - 1) * seen.logp + epsilon * (seen.lse - seen.mean_logit)
            assert not violations(smooth.flatten(), naive, exact, condition=10)


def check_traffic() -> None:
    """One exchange of 16 bytes per token, one of a few numbers per call; none in the backward, none without a shard."""
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    widths = WIDTHS[WORLD][0]
    x = columns_of(logits, widths, RANK).requires_grad_()
    with Traffic() as forward:
        out = uk.fused_loss(x, batch, uk.grpo(), shard=shard_of(widths, RANK))
    with Traffic() as backward:
        out.loss.backward()
    assert forward.sent == [("all_gather_into_tensor", 144), ("all_gather_into_tensor", 16 * batch.target.numel())]
    assert backward.sent == []
    values = [torch.zeros(1, *batch.target.shape)] * 4
    unchecked = ShardArgs(0, 1, VOCAB, shard_of(widths, RANK).ranks, False, Tiles(VOCAB, 1))
    with Traffic() as hashed:
        shards.exchanged(values, batch.target, unchecked)
    assert hashed.sent == [("all_gather_into_tensor", 16 * batch.target.numel() + 8)]
    with CommDebugMode() as counted:
        uk.fused_loss(x, batch, uk.grpo(), shard=shard_of(widths, RANK)).loss.backward()
    assert counted.get_total_counts() == 2
    with CommDebugMode() as counted:
        uk.fused_loss(logits.requires_grad_(), batch, uk.grpo()).loss.backward()
    assert counted.get_total_counts() == 0


def check_compiled() -> None:
    """fullgraph, forward and backward; there the hash of the targets goes with the moments."""
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    widths = WIDTHS[WORLD][0]
    shard = shard_of(widths, RANK)
    x = columns_of(logits, widths, RANK)
    function = torch.compile(lambda x, y: uk.token_stats(x, y, shard=shard), backend="aot_eager", fullgraph=True)
    eager, compiled = (x.clone().requires_grad_() for _ in range(2))
    uk.token_stats(eager, batch.target, shard=shard).logp.sum().backward()
    function(compiled, batch.target).logp.sum().backward()
    assert torch.equal(eager.grad, compiled.grad)
    found = function(x, torch.where(batch.target == uk.IGNORE, uk.IGNORE, RANK))
    used = batch.target != uk.IGNORE
    assert all(bool(s[used].isnan().all()) for s in found), "other targets on each rank"


def check_accelerators() -> None:
    """If reading a value waits for the device, arguments are compared once, and a hash of the targets is sent with the
    moments."""
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    widths, y = WIDTHS[WORLD][0], batch.target
    x, shard = columns_of(logits, widths, RANK), shard_of(widths, RANK)
    expected = uk.token_stats(x, y, shard=shard)
    exchange = ("all_gather_into_tensor", 16 * y.numel() + 8)
    with changed(agreement, "reading_waits", lambda target: True):
        for compared in ([("all_gather_into_tensor", 144)], []):
            with Traffic() as traffic:
                found = uk.token_stats(x, y, shard=shard)
            assert traffic.sent == [*compared, exchange]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        others = uk.token_stats(x, torch.where(y == uk.IGNORE, uk.IGNORE, RANK), shard=shard)
        assert all(bool(s[y != uk.IGNORE].isnan().all()) for s in others)


def raises(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        call()


def check_bad_input() -> None:
    """All ranks raise, and can then go on together."""
    last = WORLD - 1
    widths = WIDTHS[WORLD][0]
    logits, batch = make(CASES[0], BY_NAME["grpo"])
    x, y = columns_of(logits, widths, RANK), batch.target
    good = shard_of(widths, RANK)

    def stats(target: Tensor = y, shard: Any = good, logits: Tensor = x) -> Any:
        return uk.token_stats(logits, target, shard=shard)

    start, own = sum(widths[:last]), last == RANK
    before = f"rank {last}, where the {widths[last - 1]} columns of rank {last - 1} end"
    for wrong in (start - 1, start + 1):
        shard = uk.VocabShard(dist.group.WORLD, wrong, VOCAB) if own else good
        raises(ValueError, f"shard.start must be {start} on {before}, got {wrong}", lambda s=shard: stats(shard=s))
    shard = uk.VocabShard(dist.group.WORLD, good.start, VOCAB + 1)
    raises(ValueError, f"hold all {VOCAB + 1} columns of shard.vocab, got {VOCAB}", lambda: stats(shard=shard))
    shard = uk.VocabShard(dist.group.WORLD, good.start, VOCAB - own)
    text = f"shard.vocab must be the same on all ranks of shard.group, got {VOCAB} on rank 0 and {VOCAB - 1}"
    raises(ValueError, text, lambda: stats(shard=shard))
    other = y[:, :-1] if own else y
    text = f"target.shape[-1] must be the same on all ranks of shard.group, got {y.shape[1]} on rank 0 and"
    raises(ValueError, text, lambda: stats(other, logits=x[:, : other.shape[1]]))
    other = y.clone()
    other[0, 0] = 3 + own
    raises(ValueError, f"got 3 on rank 0 and 4 on rank {last} at (0, 0)", lambda: stats(other))
    other[0, 0] = VOCAB  # a column of padding on some ranks
    raises(
        IndexError, f"target must lie in [0, {VOCAB}) or be {uk.IGNORE}, got {VOCAB} at (0, 0)", lambda: stats(other)
    )
    kind, text = (TypeError, "logits must be one of") if own else (RuntimeError, f"rank {last} of its group refuses")
    raises(kind, text, lambda: stats(logits=x.int() if own else x))
    plan = uk.Plan(kernel="rows")
    text = "kernel must be None or 'composed' for a split vocabulary, got 'rows'"
    raises(ValueError, text, lambda: uk.fused_loss(x, batch, uk.grpo(), plan=plan, shard=good))
    stats()


def check_faults_are_seen() -> None:
    """The checks above find planted faults."""
    case, widths, loss = CASES[0], WIDTHS[WORLD][0], BY_NAME["grpo"]
    logits, batch = make(case, loss)
    own = partial(columns_of, widths=widths, rank=RANK)
    real_target, real_merge, real_exchange = ShardArgs.target, shards.merge, shards.exchanged

    def wrong_owner(self: ShardArgs, target: Tensor) -> Tensor:
        return real_target(self._replace(start=self.start + 1), target)

    def local(part: Any, target: Tensor, shard: ShardArgs) -> list[Tensor]:
        return [x[RANK : RANK + 1] for x in real_exchange(part, target, shard)]

    def rounded(parts: Any, kappa: Tensor) -> Any:
        moments = real_merge(parts, kappa)
        return moments._replace(s_minus_1=moments.s_minus_1.bfloat16().float())

    def padded(self: uk.VocabShard, columns: int) -> int:
        return columns

    faults = [
        (ShardArgs, "target", wrong_owner),
        (shards, "exchanged", local),
        (shards, "merge", rounded),
        (autograd, "of_stats", lambda *g: real_of_stats(*(None if x is None else x.mean().expand_as(x) for x in g))),
    ]
    real_of_stats = autograd.of_stats
    for owner, name, value in faults:
        with changed(owner, name, value):
            found = split(logits, batch, loss.make(), case.readout, widths, RANK, CPU)
            assert problems(found, case, logits, batch, loss.make(), own), f"{name} is not seen"
    widths = WIDTHS[WORLD][4 if WORLD == 2 else 3]
    with changed(uk.VocabShard, "used", padded):
        found = split(logits, batch, loss.make(), case.readout, widths, RANK, CPU)
        own = partial(columns_of, widths=widths, rank=RANK)
        assert problems(found, case, logits, batch, loss.make(), own), "padding is not seen"


def main(rank: int, file: str, world: int) -> None:
    global RANK, WORLD
    RANK, WORLD = rank, world
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)

    check_losses()
    check_triton()
    check_statistics()
    check_label_smoothing()
    check_traffic()
    check_accelerators()
    check_bad_input()
    check_faults_are_seen()
    check_compiled()
    split_heads.check_heads()
    split_heads.check_rounded_heads()
    split_heads.check_traffic()
    split_heads.check_compiled()
    split_heads.check_bad_input()
    split_heads.check_faults_are_seen()
    disagreements.check_all()
    sequences.check_all()
    dtensors.check_all()
    megatron.check_all()
    tiles.check_all()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
