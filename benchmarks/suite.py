"""The works that a GPU or a CPU is measured on, in one process, the most telling first: ``python -m benchmarks.suite
FOLDER`` and the parts ``logits``, ``heads`` and ``peers``; with ``--device cpu`` for a CPU. It needs nothing beside
torch and what it measures.

A record for each is written as soon as it is made, and a work that has one is left out, so that what is missing can be
asked for again. A peer that is right and faster is named. A kernel that loses the device, or does not return, is named
in FOLDER/left-out.txt and left out from then on. Exit code 1: a kernel of this package is wrong, or a work failed; 3:
such a kernel, call again for the rest.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.measurement import Measurement
from benchmarks.outcome import record_of, wrong_kernels
from benchmarks.providers import OURS, Provider
from benchmarks.record import FAILED, OK, Row, Run
from benchmarks.selection import chosen
from benchmarks.table import markdown, remarks
from benchmarks.watch import LIMITS, LOST, Watch, label
from benchmarks.work import FORWARD_BACKWARD, FUSED, STATS, Work

MODES = (FUSED, STATS, FORWARD_BACKWARD)


@dataclass(frozen=True)
class Sizes:
    """The measurements for a kind of device.

    Args:
        logits: tokens, vocabulary and dtype of each.
        heads: tokens, hidden size, vocabulary and dtype of each.
        rounds: by part.
        few_peers: time is short, so that peers are measured on one size of each only.
    """

    logits: Sequence[tuple[int, int, str]]
    heads: Sequence[tuple[int, int, int, str]]
    rounds: Mapping[str, int]
    few_peers: bool = False


SIZES = {
    "cuda": Sizes(
        (
            (256, 32000, "bf16"),  # so small that host time dominates
            (8192, 151936, "bf16"),
            (4096, 262144, "bf16"),
            (16384, 32000, "bf16"),
            (4096, 151936, "fp32"),
            (8191, 50257, "bf16"),  # odd V: only the first row is aligned
            (4096, 128256, "bf16"),
            (4096, 9496, "bf16"),
        ),
        (
            (4096, 4096, 128256, "bf16"),
            (8192, 4096, 131072, "bf16"),
            (8192, 3584, 152064, "bf16"),
            (8192, 2048, 128256, "bf16"),
            (16384, 2560, 262208, "bf16"),
        ),
        {"logits": 20, "heads": 7, "peers": 10},
        few_peers=True,
    ),
    "cpu": Sizes(
        (
            (64, 32000, "fp32"),
            (512, 151936, "fp32"),
            (512, 151936, "bf16"),
            (511, 50257, "bf16"),
            (1024, 9496, "fp32"),
            (512, 32000, "fp16"),
        ),
        (
            (2048, 576, 49152, "fp32"),
            (2048, 576, 49152, "bf16"),
            (1024, 2048, 32000, "bf16"),
            (1024, 2048, 32000, "fp32"),
            (2048, 576, 49152, "fp16"),
            (4096, 2048, 32000, "bf16"),
            (1024, 640, 262144, "fp32"),
        ),
        {"logits": 7, "heads": 3, "peers": 5},
    ),
}
PARTS = tuple(SIZES["cuda"].rounds)


def works(part: str, device: str, few: bool, modes: Sequence[str] = MODES) -> Iterator[Work]:
    """All works, the most informative first.

    Args:
        part: of the suite.
        device: as torch names it.
        few: an even and an odd size of logits, and one of heads.
        modes: what is computed.
    """
    sizes = SIZES["cuda" if few else device]
    logits, heads = sizes.logits, sizes.heads
    if part == "peers" and sizes.few_peers:
        logits, heads = logits[1:2], heads[:1]
    if few:
        logits, heads = logits[::5], heads[:1]
    asked = [(Work().loss, mode) for mode in modes]
    if part == "peers" and FUSED in modes:
        asked.insert(1, ("sft", FUSED))  # the loss that most peers have
    for loss, mode in asked:
        if part != "heads":
            yield from (Work(loss, mode, tokens=t, vocab=v, dtype=dtype, device=device) for t, v, dtype in logits)
        if part != "logits":
            yield from (Work(loss, mode, t, v, dtype, device, hidden=d) for t, d, v, dtype in heads)


def small(work: Work) -> Work:
    """The same work with small sizes, which stay odd or even."""
    hidden = None if work.hidden is None else work.hidden // 256
    return replace(work, tokens=64 + work.tokens % 2, vocab=work.vocab // 500, hidden=hidden)


def name_of(part: str, work: Work) -> str:
    size = "x".join(str(n) for n in (work.tokens, work.hidden, work.vocab) if n is not None)
    loss = "" if work.loss == Work().loss else f"-{work.loss}"
    return f"{part}-{work.mode}{loss}-{size}-{work.dtype}"


class DeviceLost(Exception):
    """This process cannot use the device any more."""


def timed(work: Work, providers: Sequence[Provider], rounds: int, watch: Watch) -> Run:
    """Check and measure one work."""

    def after_each() -> None:
        if lost(work.device):
            raise DeviceLost
        watch.rest()

    measurement = Measurement(work, [watch.over(provider) for provider in providers])
    measurement.check(after_each)
    return measurement.time(rounds, after_each)


def timed_without_failing(work: Work, providers: Sequence[Provider], rounds: int, watch: Watch) -> Run:
    """``timed``. If a provider was right and fails later, its row is marked as failed and the others are timed
    again."""
    failed: list[Row] = []
    while True:
        try:
            run = timed(work, providers, rounds, watch)
        except Exception as error:
            culprits = [provider for provider in providers if label(provider) == watch.at_work]
            if not culprits or lost(work.device):
                raise
            traceback.print_exc()
            reasons = [f"{type(error).__name__}: {error}".splitlines()[0]]
            failed += [Row(p.name, p.kernel, p.overwrites, FAILED, reasons) for p in culprits]
            providers = [provider for provider in providers if provider not in culprits]
            watch.rest()
        else:
            return replace(run, rows=[*run.rows, *failed])


def faster_peers(run: Run) -> list[str]:
    """A line for each peer that is right and faster than every kernel of this package."""
    seconds = {row.key: row.time.median for row in run.rows if row.time is not None and row.status == OK}
    ours = [seconds[row.key] for row in run.rows if row.name == OURS and row.key in seconds]
    peers = [row.key for row in run.rows if row.name != OURS and row.key in seconds]
    best = min(ours, default=None)
    return [f"FASTER {key}: {seconds[key] / best:.2f} x" for key in peers if best is not None and seconds[key] < best]


def measure(part: str, work: Work, options: argparse.Namespace, watch: Watch) -> str:
    """Measure, show and save one work. Returns what is wrong with it; empty if nothing is."""
    file = options.folder / f"{name_of(part, work)}.json"
    if file.exists():
        return ""
    left_out = watch.left_out()
    providers = chosen(work, options.kernels, ["all"] if part == "peers" else ["eager"])
    rounds = 2 if options.small else SIZES[work.device].rounds[part]
    try:
        run = timed_without_failing(work, [p for p in providers if label(p) not in left_out], rounds, watch)
        run = replace(run, skipped={**run.skipped, **left_out})
        print(markdown(run), *remarks(run), *faster_peers(run), sep="\n", flush=True)
        if not any(row.name == OURS for row in run.rows):  # without a record, so that a later step measures it
            return f"no kernel of this package ran: {run.skipped}"
        record_of([run], torch.device(work.device)).save(file)
        return wrong_kernels([run])
    except Exception as error:  # go on with the next work
        traceback.print_exc()
        if lost(work.device):
            raise DeviceLost from error
        return f"{type(error).__name__}: {error}".splitlines()[0]


def lost(device: str) -> bool:
    """After an invalid memory access this process cannot use the device any more."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def release(device: str) -> None:
    """Free the memory of a work."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--kernels", type=lambda text: text.split(","), help="default: those of the device")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--small", action="store_true", help="on the CPU, to try the suite itself")
    options = parser.parse_args()
    device = "cpu" if options.small else options.device
    options.kernels = options.kernels or {"cuda": ["triton", "cuda"], "cpu": ["cpu"]}[device]
    options.folder.mkdir(parents=True, exist_ok=True)
    watch, code = Watch(options.folder / "left-out.txt", LIMITS[device]), 0
    for part in options.parts:
        for work in works(part, device, options.small, options.modes):
            work = small(work) if options.small else work
            print(f"== {name_of(part, work)}", flush=True)
            try:
                wrong = measure(part, work, options, watch)
            except DeviceLost:
                print(f"WRONG {name_of(part, work)}: {watch.blame('loses the device')}", flush=True)
                return LOST if watch.at_work else 1  # if no kernel was running, another process would fail too
            finally:
                watch.rest()
            if wrong:
                print(f"WRONG {name_of(part, work)}: {wrong}", flush=True)
                code = 1
            release(device)
    return code


if __name__ == "__main__":
    sys.exit(main())
