"""The bench from beginning to end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from rich.console import Console

from benchmarks.arguments import usable_device
from benchmarks.defaults import ROUNDS, SIZE, SWEPT_SIZE, SWEPT_TOKENS, SWEPT_VOCABS
from benchmarks.measurement import Measurement
from benchmarks.memory import Peaks
from benchmarks.outcome import record_of, wrong_kernels
from benchmarks.own import own
from benchmarks.providers import OURS, Provider, prepare
from benchmarks.record import Run, make_writable, size
from benchmarks.selection import chosen
from benchmarks.table import remarks, terminal
from benchmarks.terminal import Stages, open_console
from benchmarks.work import Work
from unirl_kernels.commands.cli import CommandFailed


def run_bench(options: argparse.Namespace) -> int:
    """Measure, show, save after each piece of work.

    Returns:
        The exit code, 0.

    Raises:
        CommandFailed: when something that was asked for cannot be had, or a kernel of this package, or the user's own,
            is wrong.
    """
    _check_level(options)
    device = usable_device(options.device)
    rounds = options.rounds or ROUNDS[device.type]
    works = [(work, _providers(work, options)) for work in _works(options, device)]
    answerable = {OURS} | {provider.name for _, providers in works for provider in providers if provider.source}
    make_writable(options.out)
    console = open_console()
    runs: list[Run] = []
    for work, providers in works:

        def keep(run: Run) -> None:
            if options.out is not None:
                record_of([*runs, run], device).save(options.out)

        runs.append(measured(work, providers, rounds, options.memory and not options.sweep, console, keep))
    if wrong := wrong_kernels(runs, answerable):
        raise CommandFailed(wrong)
    return 0


def _check_level(options: argparse.Namespace) -> None:
    """Raise where an option is about the other level."""
    of_logits, of_heads = ("sweep", "overwrite", "fresh"), ("chunk_bytes",)
    for name in of_logits if options.hidden else of_heads:
        if getattr(options, name):
            level = "logits: not with --hidden" if options.hidden else "linear heads: give --hidden"
            raise CommandFailed(f"--{name.replace('_', '-')} is about {level}")


def _works(options: argparse.Namespace, device: torch.device) -> Iterator[Work]:
    """One piece of work, or those of the sweeps."""
    tokens, vocab = SWEPT_SIZE[device.type] if options.sweep else SIZE
    tokens, vocab = options.tokens or tokens, options.vocab or vocab
    names = ("loss", "mode", "dtype", "on_policy", "seed", "hidden", "chunk_bytes")
    try:
        work = Work(tokens=tokens, vocab=vocab, device=str(device), **{name: getattr(options, name) for name in names})
        if not options.sweep:
            yield work
            return
        yield from (replace(work, vocab=n) for n in SWEPT_VOCABS)
        yield from (replace(work, tokens=n) for n in SWEPT_TOKENS)
    except ValueError as error:
        raise CommandFailed(f"--{error}") from error


def _providers(work: Work, options: argparse.Namespace) -> list[Provider]:
    overwrite = True if options.overwrite else False if options.fresh else None
    users = [own(text, work) for text in dict.fromkeys(options.provider)]
    try:
        return [*users, *chosen(work, options.kernels, options.peers, overwrite)]
    except ValueError as error:
        raise CommandFailed(str(error)) from error


def measured(
    work: Work,
    providers: Sequence[Provider],
    rounds: int,
    memory: bool,
    console: Console,
    keep: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Measure one piece of work, and show it; ``keep`` gets the times as soon as there are any, and again with the
    memory."""
    stages = Stages(console)
    with stages.stage("Preparing providers"):
        prepare(providers, torch.device(work.device))
    with Peaks(work, beside=memory, fresh=_is_fresh(work, providers)) as peaks:
        with stages.stage(f"Making inputs, {size(work)}"):
            measurement = Measurement(work, providers)
        with stages.stage("Checking against fp64", len(providers)) as after_each:
            measurement.check(after_each, peaks.ask)
        if peaks.asked:
            with stages.stage("Measuring memory", len(peaks.asked)) as after_each:
                peaks.wait(after_each)
        with stages.stage("Timing", measurement.calls(rounds)) as after_each:
            run = measurement.time(rounds, after_each, keep)
        keep(run)
        if memory:
            run = _with_memory(measurement, run, peaks, stages)
            keep(run)
    console.print(terminal(run, console.width))
    for remark in remarks(run):
        console.print(remark, style="dim", markup=False, highlight=False, soft_wrap=True)
    return run


def _is_fresh(work: Work, providers: Sequence[Provider]) -> bool:
    """Whether this process has computed nothing yet. Tests have, and a user's file may have."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_the_command = spec is not None and spec.name == "benchmarks.__main__"
    return is_the_command and not (work.own or any(provider.source for provider in providers))


def _with_memory(measurement: Measurement, run: Run, peaks: Peaks, stages: Stages) -> Run:
    if peaks.asked:
        return measurement.memory(run, peaks, lambda: None)
    with stages.stage("Measuring memory", len(measurement.cases)) as after_each:
        return measurement.memory(run, peaks, after_each)
