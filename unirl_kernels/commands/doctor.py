"""What is available here, and why the rest is not: versions, devices, backends, instruction set."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from unirl_kernels import backends
from unirl_kernels._version import __version__
from unirl_kernels.commands.machine import processor
from unirl_kernels.integrations import llamafactory, openrlhf, swift, trl, unsloth, verl
from unirl_kernels.integrations.versions import AXOLOTL, is_between

HELP = "what is available here, and why the rest is not"

NO_BACKEND = 1


class Section(NamedTuple):
    """A table: columns and rows."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(options: argparse.Namespace) -> int:
    """Print what is available.

    Returns:
        The exit code: 0 when at least one backend runs on at least one device.
    """
    found = examine()
    if options.json:
        _print_json(found)
    elif importlib.util.find_spec("rich"):  # a doctor must speak on a bare machine, too
        _print_rich(found)
    else:
        _print_plain(found)
    works = any(row[2] == "yes" for section in found if section.title == "Backends" for row in section.rows)
    return 0 if works else NO_BACKEND


def examine() -> list[Section]:
    """What is available here."""
    devices = _devices()
    return [
        Section("Versions", ("package", "version"), _versions()),
        Section("Devices", ("device", "what it is"), devices),
        Section(
            "Backends",
            ("device", "backend", "runs", "kernels, or why not"),
            [_backend(torch.device(device), name) for device, _ in devices for name in backends.MODULES],
        ),
        Section(
            "Default",
            ("device", "backend and kernel"),
            [row for device, _ in devices for row in _defaults(torch.device(device))],
        ),
        Section("Native extension", ("what", "found"), _native()),
        Section("Trainers", ("package", "version", "tried", "with"), [_trainer(*trainer) for trainer in TRAINERS]),
    ]


def _versions() -> list[tuple[str, str]]:
    found = [("unirl_kernels", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    for package in ("torch", "triton", "numpy"):
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return [*found, ("CUDA of torch", torch.version.cuda or "none")]


TRAINERS = (
    ("trl", trl.FIRST, trl.LAST, "trl.patch(); of the last release fuse(trainer), loss(config), too"),
    ("verl", verl.TRIED, verl.TRIED, "verl.patch(), fuse(worker), loss(actor_config)"),
    ("openrlhf", openrlhf.TRIED, openrlhf.TRIED, "openrlhf.patch()"),
    ("llamafactory", llamafactory.TRIED, llamafactory.TRIED, "llamafactory.patch()"),
    ("ms-swift", swift.TRIED, swift.TRIED, "swift.patch()"),
    ("unsloth", unsloth.TRIED, unsloth.TRIED, "unsloth.patch()"),
    ("axolotl", AXOLOTL, AXOLOTL, "axolotl.FusedLossPlugin, in a configuration's plugins"),
)
"""Each trainer with the first and the last release that was tried, and its functions in ``integrations``."""


def _trainer(package: str, first: str, last: str, what: str) -> tuple[str, str, str, str]:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package, "not installed", "-", what
    if is_between(found, first, last):
        return package, found, "yes", what
    return package, found, "no", f"tried: {first if first == last else f'{first} to {last}'}"


def _devices() -> list[tuple[str, str]]:
    cpu = f"{processor()}; {os.cpu_count()} logical cores, {torch.get_num_threads()} threads used"
    found = [("cpu", cpu)]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            (
                f"cuda:{i}",
                f"{properties.name}; sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors",
            )
        )
    return found


def _backend(device: torch.device, name: str) -> tuple[str, str, str, str]:
    reason = backends.unavailable(name, device)
    if reason is not None:
        return str(device), name, "no", reason
    return str(device), name, "yes", ", ".join((*backends.load(name).KERNELS, backends.COMPOSED))


def _defaults(device: torch.device) -> list[tuple[str, str]]:
    """The default backend and kernel, by dtype of the logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a slow default is what the table above shows
        return [
            (f"{device}, {name}", backends.told(backends.choices_by_vocab(device, None, None, dtype)))
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        ]


def _native() -> list[tuple[str, str]]:
    from unirl_kernels.backends import cpu

    try:
        return [("built", "yes"), *cpu.report().items()]
    except (ImportError, RuntimeError, ValueError) as error:
        return [("usable", f"no: {error}")]


def _print_rich(sections: Sequence[Section]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for section in sections:
        table = Table(*section.columns, title=section.title, title_justify="left", title_style="bold")
        colours = {"yes": "green", "no": "red"}
        for row in section.rows:
            table.add_row(*(f"[{colours[cell]}]{cell}[/]" if cell in colours else escape(cell) for cell in row))
        console.print(table)


def _print_json(sections: Sequence[Section]) -> None:
    """Print a list of objects for each section, with the columns as keys."""
    found = {
        section.title: [dict(zip(section.columns, row, strict=True)) for row in section.rows] for section in sections
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _print_plain(sections: Sequence[Section]) -> None:
    for section in sections:
        widths = [max(map(len, column)) for column in zip(section.columns, *section.rows, strict=True)]
        sys.stdout.write(f"{section.title}\n")
        for row in section.rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write(f"  {'  '.join(cells).rstrip()}\n")
