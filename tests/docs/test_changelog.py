"""CHANGELOG.md names what changed since the last release."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import unirl_kernels
from tests.docs.public_names import RELEASED, changed, last_released, names, read

CHANGELOG = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()
SECTIONS = re.findall(r"^## (.+)$", CHANGELOG, flags=re.MULTILINE)


def unreleased() -> str:
    """The text of the first section."""
    return CHANGELOG.split("\n## ")[1]


@pytest.mark.parametrize("name", changed(last_released(), names()))
def test_changed_public_name_is_named(name: str) -> None:
    assert re.search(rf"`(uk\.)?{re.escape(name)}[`(]", unreleased()), f"CHANGELOG.md must name `{name}`: Unreleased"


def test_sections_are_unreleased_and_releases() -> None:
    assert SECTIONS[0] == "Unreleased"
    releases = [re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)", section) for section in SECTIONS[1:]]
    assert all(releases), "a release is headed by its version and date: 0.1.0 (2026-01-31)"
    assert {found[1] for found in releases if found} == {path.stem for path in RELEASED.glob("*.txt")}


def test_what_is_added_removed_or_takes_something_else_has_changed() -> None:
    before = {"same": "x", "gone": "", "takes": "x, y"}
    assert changed(before, {"same": "x", "new": "", "takes": "x, *, y"}) == ["gone", "new", "takes"]


def test_names_are_read_as_they_are_printed() -> None:
    now = names()
    assert set(now) == set(unirl_kernels.__all__)
    assert read("".join(f"{name}({parameters})\n" for name, parameters in now.items())) == now
    assert now["fused_loss"] == "logits, batch, loss, *, readout, plan, shard"
    assert now["IGNORE"] == ""
