"""Which release of another library is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def check_installed(package: str, known: str) -> None:
    """Check that a library is there, in the release that an integration was written for.

    Args:
        package: its name for pip.
        known: the first numbers of its version, such as ``0.11``.

    Raises:
        ImportError: when it is not installed.
        RuntimeError: when its version is another.
    """
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed: pip install {package}") from error
    if found.split(".")[: known.count(".") + 1] != known.split("."):
        raise RuntimeError(f"{package} must be of version {known}, got {found}")
