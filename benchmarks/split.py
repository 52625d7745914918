"""``--tp N``: measures a vocabulary that is split over N local processes, and kernels that do not communicate."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import unirl_kernels as uk
from benchmarks import hardware
from benchmarks.measure import Timing, interleaved_times
from benchmarks.record import make_writable, save
from benchmarks.work import DTYPES

SIZE = (512, 49152)
ROUNDS = 15
SPLIT = "split: statistics, exchange, gradient"
ONE_PASS, TWO_PASSES = "V / N columns alone: default kernel", "V / N columns alone: statistics, then the gradient"


class Setting(NamedTuple):
    """The options of a split run, in a form that can be sent to a process."""

    tp: int
    tokens: int
    vocab: int
    hidden: int | None
    dtype: str
    rounds: int
    seed: int


def run_split(options: argparse.Namespace) -> int:
    """Time GRPO with its gradient on each rank, print the slowest rank's medians, and save them."""
    if options.device not in (None, "cpu"):
        raise ValueError(f"--tp must run on the cpu, got --device {options.device}")
    make_writable(options.out)
    with tempfile.TemporaryDirectory() as folder:
        tokens, vocab = options.tokens or SIZE[0], options.vocab or SIZE[1]
        rounds = options.rounds or ROUNDS
        setting = Setting(options.tp, tokens, vocab, options.hidden, options.dtype, rounds, options.seed)
        arguments = (setting, str(Path(folder) / "store"), options.out)
        torch.multiprocessing.spawn(_rank, args=arguments, nprocs=options.tp)  # type: ignore[attr-defined,no-untyped-call]
    return 0


def _rank(rank: int, setting: Setting, store: str, out: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=setting.tp)
    calls = _calls(setting, rank)
    times = interleaved_times(calls, torch.device("cpu"), rounds=setting.rounds, warmup=3, after_call=dist.barrier)
    slowest = torch.tensor([[times[name].median, times[name].p20, times[name].p80] for name in calls])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    medians = slowest[:, 0]
    if rank == 0:
        if out is not None:
            found = {name: Timing(*row) for name, row in zip(calls, slowest.tolist(), strict=True)}
            save(_record(setting, found), out)
        tokens, vocab = setting.tokens, setting.vocab
        hidden = f" × {setting.hidden}" if setting.hidden else ""
        print(f"grpo, {tokens}{hidden} × {vocab} {setting.dtype} over {setting.tp} processes of one thread")
        for name, median in zip(calls, medians.tolist(), strict=True):
            print(f"{1e3 * median:9.2f} ms  {medians[0].item() / median:5.2f}  {name}")
        print("The second column is the time of the split call over that of the row.")
    dist.destroy_process_group()


def _record(setting: Setting, times: Mapping[str, Timing]) -> dict[str, object]:
    """Results and machine; seconds of the slowest rank."""
    commit, dirty = hardware.commit()
    return {
        "date": hardware.now(),
        "commit": commit,
        "dirty": dirty,
        "versions": hardware.versions(),
        "hardware": hardware.hardware(torch.device("cpu")),
        "split": setting._asdict(),
        "times": {name: asdict(time) for name, time in times.items()},
    }


def _calls(setting: Setting, rank: int) -> dict[str, Callable[[], object]]:
    tokens, vocab, dtype = setting.tokens, setting.vocab, DTYPES[setting.dtype]
    torch.manual_seed(setting.seed)
    width = -(-vocab // setting.tp)
    start = min(rank * width, vocab)
    target = torch.randint(0, vocab, (1, tokens))
    old_logp, ref_logp = -4 * torch.rand(2, 1, tokens)
    batch = uk.Batch(target, torch.ones(1), old_logp, ref_logp)
    own = min(width, vocab - start)
    local = uk.Batch(target % own, batch.advantage, old_logp, ref_logp)
    assert dist.group.WORLD is not None
    shard = uk.VocabShard(dist.group.WORLD, start, vocab)
    composed = uk.Plan(kernel="composed")
    if setting.hidden:
        operands = [
            torch.randn(1, tokens, setting.hidden, dtype=dtype),
            torch.randn(own, setting.hidden, dtype=dtype) * setting.hidden**-0.5,
        ]
        function: Callable[..., uk.LossOutput] = uk.fused_linear_loss
    else:
        operands = [torch.randn(1, tokens, own, dtype=dtype)]
        function = uk.fused_loss
    leaves = [x.requires_grad_() for x in operands]

    def call(batch: uk.Batch, plan: uk.Plan, shard: uk.VocabShard | None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, batch, uk.grpo(), plan=plan, shard=shard).loss, leaves)

    return {
        SPLIT: lambda: call(batch, uk.Plan(), shard),
        ONE_PASS: lambda: call(local, uk.Plan(), None),
        TWO_PASSES: lambda: call(local, composed, None),
    }
