"""The command line. A command is a module with ``HELP``, ``add_options(parser)`` and ``run(options) -> exit code``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from unirl_kernels._version import __version__

COMMANDS = {
    "bench": "unirl_kernels.bench.options",
    "demo": "unirl_kernels.demo.options",
    "doctor": "unirl_kernels.doctor",
}

WRONG_USAGE = 2
INTERRUPTED = 130


class CommandFailed(Exception):
    """A command cannot do what was asked of it; the message is one line that says why and what to do."""


class _Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line; argparse would print the usage, many lines, before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="unirl_kernels", description="Fused kernels for the loss head of LLM post-training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = importlib.import_module(module)
        options = commands.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_options(options)
        options.set_defaults(run=command.run, parser=options)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or what went wrong: 1 a command that failed, 2 wrong options (raised as ``SystemExit``).
    """
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options))
    except CommandFailed as failure:
        print(f"unirl_kernels {options.command}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"unirl_kernels {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
