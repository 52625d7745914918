"""``Patch`` for modules of any name: module attributes and entries of dictionaries, and every object back."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from unirl_kernels.integrations.patching import Patch, Replacement


def old() -> str:
    return "old"


def new() -> str:
    return "new"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = {}
    for name in ("my_trainer", "my_trainer.losses", "my_trainers", "another"):
        found[name] = ModuleType(name)
        found[name].score = old  # type: ignore[attr-defined]
        found[name].TABLE = {"score": old, "other": len}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, found[name])
    return found


def test_modules_and_their_dictionaries(modules: dict[str, Any]) -> None:
    with Patch([Replacement(old, new, ("my_trainer", "another"))]):
        held = {name: (module.score(), module.TABLE["score"]()) for name, module in modules.items()}
        assert held == dict.fromkeys(modules, ("new", "new")) | {"my_trainers": ("old", "old")}
    assert all(module.score is old and {"score": old, "other": len} == module.TABLE for module in modules.values())


def test_a_star_stands_for_anything(modules: dict[str, Any]) -> None:
    with Patch([Replacement(old, new, "my_*s")]):
        held = {name: module.score() for name, module in modules.items()}
    assert held == dict.fromkeys(modules, "old") | {"my_trainers": "new", "my_trainer.losses": "new"}
    assert all(module.score is old for module in modules.values())


def test_nothing_is_replaced_where_one_object_is_missing(modules: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="no module of 'my_trainer' holds"):
        Patch([Replacement(old, new, "my_trainer"), Replacement(object(), new, "my_trainer")])
    assert modules["my_trainer"].score is old
