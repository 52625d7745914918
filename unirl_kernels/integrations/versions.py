"""Releases of trainers. A release that was not tried gives a warning; patches check signatures."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, version

SWITCH = "UNIRL_UNTRIED_VERSIONS"
"""Environment variable for releases that were not tried: one of ``CHOICES``; default: warn."""

CHOICES = ("warn", "allow", "refuse")

AXOLOTL = "0.19"
"""The release of axolotl that was tried; ``integrations.axolotl`` needs axolotl to be imported."""


def check_release(package: str, first: str, last: str) -> None:
    """Warn if the installed release of a package was not tried.

    Args:
        package: its name.
        first, last: the releases that were tried, both included, such as "1.10". Further numbers are ignored: "1.10"
            includes 1.10.3 and 1.10rc1.

    Raises:
        ImportError: when the package is not installed.
        RuntimeError: when the release was not tried, and ``UNIRL_UNTRIED_VERSIONS`` is ``refuse``.
        ValueError: when ``UNIRL_UNTRIED_VERSIONS`` is not one of ``CHOICES``.
    """
    choice = os.environ.get(SWITCH, "warn")
    if choice not in CHOICES:
        raise ValueError(f"{SWITCH} must be one of {', '.join(CHOICES)}, got {choice!r}")
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed: pip install {package}") from error
    if choice == "allow" or is_between(installed, first, last):
        return
    tried = first if first == last else f"{first} to {last}"
    if choice == "refuse":
        raise RuntimeError(f"{package} must be of version {tried}, got {installed} ({SWITCH}=refuse)")
    warnings.warn(
        f"{package} {installed} was not tried, only {tried}: compare what a step logs with and without unirl_kernels. "
        f"Set {SWITCH}=allow for no warning, {SWITCH}=refuse for an error",
        stacklevel=3,
    )


def is_between(installed: str, first: str, last: str) -> bool:
    """Whether a version is in the range from first to last; further numbers are ignored."""
    # Whatever needs this check depends on packaging itself.
    from packaging.version import InvalidVersion, Version

    try:
        release = (*Version(installed).release, 0)[: len(Version(first).release)]
    except InvalidVersion:
        return False
    return Version(first).release <= release <= Version(last).release
