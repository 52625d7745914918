"""Kernels and their peers side by side, on logits or linear heads: time against the floor, memory, errors."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.arguments import DEVICE_HELP, at_least, need
from benchmarks.defaults import ROUNDS, SIZE, SWEPT_SIZE
from benchmarks.own_loss import loss_name
from benchmarks.work import DTYPES, FUSED, MODES
from unirl_kernels.commands.cli import Help
from unirl_kernels.testing import oracle

HELP = "kernels and peers side by side: time against the floor, memory, errors"

OWN = """your own kernel or peer, held against fp64 as the others are; may be given several times.
FUNCTION(logits, batch), or FUNCTION(hidden, weight, batch) with --hidden, returns the loss or (loss, logp);
in the modes of statistics it returns logp or (logp, entropy). logits [B, L, V], hidden [B, L, D], weight [V, D],
batch a unirl_kernels.Batch; loss 0-dim and differentiable, logp and entropy [B, L]. The loss is --loss with its
default numbers. FUNCTION.overwrites = True: it leaves the gradients in the memory of the operands"""


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    own = "or an objective of your own, FILE.py:OBJECTIVE, as for python -m unirl_kernels explain"
    add("--loss", type=loss_name, default="grpo", help=f"what is computed: {', '.join(oracle.LOSSES)}; {own}")
    add("--mode", choices=tuple(MODES), default=FUSED, help="; ".join(f"{k}: {v}" for k, v in MODES.items()))
    swept = ", ".join(f"{tokens} × {vocab} ({device})" for device, (tokens, vocab) in SWEPT_SIZE.items())
    add("--tokens", type=at_least(1), help=f"rows of logits; by default {SIZE[0]}")
    add("--vocab", type=at_least(2), help=f"columns of logits; by default {SIZE[1]}")
    add(
        "--hidden", type=at_least(1), help="size of a hidden state: compare linear heads, from hidden states and weight"
    )
    add("--dtype", choices=tuple(DTYPES), default="bf16", help="of the logits, or of hidden states and weight")
    add("--device", help=DEVICE_HELP)
    add("--kernels", type=_names, default="all", help="of this package: all, none, or names as cpu,triton/two_sweep")
    add("--peers", type=_names, default="all", help="all, none, or names as eager,compile,trl")
    add("--provider", action="append", default=[], metavar="FILE.py:FUNCTION", help=OWN)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--overwrite", action="store_true", help="of logits, only gradients in their memory")
    place.add_argument("--fresh", action="store_true", help="of logits, only gradients in fresh memory")
    chunks = "memory for the logits of one chunk, in this package's linear heads; by default as much as is good"
    add("--chunk-bytes", type=at_least(1), help=chunks)
    add("--on-policy", action="store_true", help="no old log-probabilities: the ratio is 1")
    add(
        "--rounds",
        type=at_least(2),
        help=f"timed calls of each; by default {ROUNDS['cpu']} on a CPU, {ROUNDS['cuda']} on a GPU",
    )
    memory = "peak memory, each in a process of its own; never in a sweep"
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help=memory)
    add("--sweep", action="store_true", help=f"of logits, change the vocabulary, then the tokens, each from {swept}")
    add("--tp", type=at_least(2), help="split the vocabulary over that many processes of this machine")
    add("--seed", type=at_least(0), default=0, help="of the random numbers")
    add("--out", type=Path, metavar="FILE.json", help="where to save the results")
    actions = parser.add_subparsers(metavar="[plot | readme | compare | table]", help="of saved results; bare: measure")
    plot = actions.add_parser(
        "plot", help="draw saved results", description="Draw saved results.", formatter_class=Help
    )
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="saved results")
    plot.add_argument("--folder", type=Path, default=Path("."), help="where the pictures go")
    plot.set_defaults(run=run_plot)
    renews = "renew the tables between bench markers"
    readme = actions.add_parser("readme", help=renews, description=f"{renews}.", formatter_class=Help)
    readme.add_argument("--file", type=Path, default=Path("README.md"), help="the document")
    readme.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the saved results")
    readme.set_defaults(run=run_readme)
    told = "what became slower, larger or wrong between two saved results; exit code 1 where something did"
    compared = actions.add_parser("compare", help=told, description=f"{told}.", formatter_class=Help)
    compared.add_argument("old", type=Path, metavar="OLD.json", help="saved results")
    compared.add_argument("new", type=Path, metavar="NEW.json", help="saved results of the same work")
    compared.set_defaults(run=run_compare)
    told = "saved results as Markdown or CSV, on the standard output"
    table = actions.add_parser("table", help=told, description=f"{told}.", formatter_class=Help)
    table.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="saved results")
    table.add_argument("--format", choices=("markdown", "csv"), default="markdown", help="of the table")
    table.set_defaults(run=run_table)


def run(options: argparse.Namespace) -> int:
    if options.tp:
        from benchmarks.split import run_split

        return run_split(options)
    need({"rich": "rich"})
    from benchmarks.run import run_bench

    return run_bench(options)


def run_plot(options: argparse.Namespace) -> int:
    need({"matplotlib": "matplotlib"})
    from benchmarks.plot import plot

    return plot(options.files, options.folder)


def run_compare(options: argparse.Namespace) -> int:
    from benchmarks import compare

    return compare.run_compare(options.old, options.new)


def run_table(options: argparse.Namespace) -> int:
    need({"rich": "rich"})
    from benchmarks.export import exported

    sys.stdout.write(exported(options.files, options.format))
    return 0


def run_readme(options: argparse.Namespace) -> int:
    need({"rich": "rich"})
    from benchmarks.readme import renew

    return renew(options.file, options.results)
