"""The command line. A command is a module with ``HELP``, ``add_options(parser)`` and ``run(options) -> exit code``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from unirl_kernels._version import __version__

COMMANDS = {"doctor": "unirl_kernels.commands.doctor", "explain": "unirl_kernels.commands.explain"}

WRONG_USAGE = 2
INTERRUPTED = 130


class CommandFailed(Exception):
    """A command failed; the message is one line that says why and what to do."""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line; argparse would first print the usage, which is long."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_one = action.default not in (None, []) and action.default is not False
        return super()._get_help_string(action) if has_one else action.help


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="unirl_kernels", description="Fused kernels for the loss head of LLM post-training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = importlib.import_module(module)
        options = commands.add_parser(name, help=command.HELP, description=command.__doc__, formatter_class=Help)
        _fill(options, command)
    return parser


def _fill(parser: argparse.ArgumentParser, command: ModuleType) -> None:
    command.add_options(parser)
    parser.set_defaults(run=command.run, parser=parser)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, or what went wrong: 1 a command that failed, 2 wrong options (raised as ``SystemExit``).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return _execute(_parser(), arguments)


def run_alone(command: ModuleType, prog: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command as a separate program.

    Args:
        command: its module.
        prog: what starts it, for help and errors.
        arguments: as those of ``main``.

    Returns:
        As ``main``.
    """
    parser = _Parser(prog=prog, description=command.__doc__, formatter_class=Help)
    _fill(parser, command)
    return _execute(parser, arguments)


def _execute(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options))
    except CommandFailed as failure:
        print(f"{options.parser.prog}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
