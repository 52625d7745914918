"""Option types and checks that several commands share."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping

import torch

from unirl_kernels.commands.cli import CommandFailed

DEVICES = ("cpu", "cuda")
"""Kinds of devices that compute in fp64, the truth of every comparison, and that ``measure`` knows."""
DEVICE_HELP = "cpu, cuda, cuda:1 ...; by default cuda where there is one, else cpu"


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that takes integers from ``least`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """The type of an option that takes numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def usable_device(name: str | None) -> torch.device:
    """The device that ``--device`` names; the first GPU, or the CPU, for None.

    Raises:
        CommandFailed: when it is none of ``DEVICES`` or not available here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandFailed(f"--device {name} is not available: {reason}") from error
    if device.type not in DEVICES:
        raise CommandFailed(f"--device must be of {', '.join(DEVICES)}, got {name}")
    return device


def need(packages: Mapping[str, str]) -> None:
    """Check that packages are installed before anything imports them.

    Args:
        packages: modules, each with the name under which pip knows its package.

    Raises:
        CommandFailed: names the missing packages and how to install them.
    """
    missing = [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandFailed(f"not installed: {', '.join(missing)}; get it with: pip install {' '.join(missing)}")
