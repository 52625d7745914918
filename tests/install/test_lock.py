"""constraints.txt has one release of each package that ``make setup`` installs, and nothing else."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MACHINE = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}


def applies(requirement: Requirement, python: str) -> bool:
    environment = MACHINE | {"python_version": python, "python_full_version": f"{python}.9"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def asked() -> list[Requirement]:
    """What ``make lock`` starts from: the same variables, and the extras' requirements."""
    if which("make") is None:
        pytest.skip("make is not installed")
    printed = subprocess.run(["make", "-n", "lock"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = [word for line in re.findall(r"^printf \S+ (.*?) \|", printed, flags=re.M) for word in shlex.split(line)]
    extras = re.findall(r"--extra (\w+)", printed)
    assert named
    assert extras
    listed = PROJECT["dependencies"] + [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
    return [Requirement(text) for text in named + listed]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_release(python: str) -> None:
    pins = {canonicalize_name(pin.name): pin for pin in PINS if applies(pin, python)}
    for requirement in asked():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt must name {requirement.name} for Python {python}: run make lock"
        (release,) = pin.specifier
        assert requirement.specifier.contains(release.version), f"{pin} is not {requirement}: run make lock"


@pytest.mark.parametrize("python", PYTHONS)
def test_no_package_has_two_releases(python: str) -> None:
    names = [canonicalize_name(pin.name) for pin in PINS if applies(pin, python)]
    assert sorted(set(names)) == sorted(names)


def test_pins_are_releases_alone() -> None:
    for pin in PINS:
        assert pin.url is None
        assert [part.operator for part in pin.specifier] == ["=="]
