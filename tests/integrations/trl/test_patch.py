"""TRL patched and put back: every object, in every module, and what is not known named."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl.trainer.utils as utils

import unirl_kernels as uk
from tests.integrations.trl.heads import HEAD
from unirl_kernels.integrations.patching import Patch, Replacement
from unirl_kernels.integrations.trl import patch, unpatch

HEADS = ["selective_log_softmax", "entropy_from_logits", *([] if HEAD is None else ["_ChunkedLogProbFunction"])]
SINCE = ["selective_log_softmax_and_entropy", "add_fused_lm_head", "_use_triton"]
"""What later versions have besides."""

REPLACED = [*HEADS, *(name for name in SINCE if hasattr(utils, name))]


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    unpatch()


def loaded() -> dict[tuple[str, str], object]:
    """Every object of every trl module."""
    modules = [(name, module) for name, module in sys.modules.items() if name.split(".")[0] == "trl"]
    return {(name, key): value for name, module in modules for key, value in vars(module).items()}


def check_same(before: dict[tuple[str, str], object]) -> None:
    now = loaded()
    assert [place for place, value in before.items() if now.get(place) is not value] == []


def holders(function: object) -> set[str]:
    return {name for (name, _), value in loaded().items() if value is function}


def test_every_object_is_put_back() -> None:
    importlib.import_module("trl.trainer.grpo_trainer")
    before, originals = loaded(), [getattr(utils, name) for name in REPLACED if name != "_use_triton"]
    patch()
    assert all(not holders(original) for original in originals)
    unpatch()
    check_same(before)
    unpatch()
    check_same(before)


def test_modules_imported_meanwhile_get_the_originals_back(monkeypatch: pytest.MonkeyPatch) -> None:
    experimental = importlib.import_module("trl.experimental")
    for name in [name for name in sys.modules if name.startswith("trl.experimental.cpo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(experimental, "cpo", raising=False)
    original = utils.selective_log_softmax
    before = loaded()
    patch()
    late = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    assert late.selective_log_softmax is utils.selective_log_softmax is not original
    unpatch()
    assert late.selective_log_softmax is original
    check_same(before)


def test_patching_again_changes_the_plan() -> None:
    before = loaded()
    patch()
    own, first = before["trl.trainer.utils", "selective_log_softmax"], utils.selective_log_softmax
    patch(uk.Plan(backend="eager"))
    assert utils.selective_log_softmax not in (first, own)
    assert not holders(first)
    unpatch()
    check_same(before)


def test_context_ends_with_an_error_too() -> None:
    before = loaded()
    with pytest.raises(ZeroDivisionError), patch() as active:
        raise ZeroDivisionError
    check_same(before)
    active.undo()
    with patch():
        unpatch()
        check_same(before)
    check_same(before)


def test_undoing_twice_leaves_a_later_patch_alone() -> None:
    def later() -> None: ...

    replacement = Replacement(utils.entropy_from_logits, later, "trl")
    with Patch([replacement]) as first:
        pass
    with Patch([replacement]):
        first.undo()
        assert utils.entropy_from_logits is later
    assert utils.entropy_from_logits is replacement.old


def test_signatures_decide_and_a_release_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    own = utils.selective_log_softmax
    monkeypatch.setattr("unirl_kernels.integrations.versions.version", lambda _: "1.17.0")
    with pytest.warns(UserWarning, match=r"trl 1.17.0 was not tried, only 0.24 to 1.16"), patch():
        assert utils.selective_log_softmax is not own


def test_a_release_that_has_functions_of_logits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As below 1.7."""
    for name in ("_ChunkedLogProbFunction", "add_fused_lm_head", "patch_chunked_lm_head", *SINCE):
        monkeypatch.delattr(utils, name, raising=False)
    before, logits = loaded(), torch.randn(2, 3, 7)
    index, own = torch.randint(0, 7, (2, 3)), utils.selective_log_softmax
    with patch():
        assert utils.selective_log_softmax is not own
        torch.testing.assert_close(utils.selective_log_softmax(logits, index), own(logits, index))
    check_same(before)


def test_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("unirl_kernels.integrations.versions.version", missing)
    with pytest.raises(ImportError, match="trl is not installed"):
        patch()


@pytest.mark.parametrize("name", HEADS)
def test_what_is_gone_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, name)
    before = loaded()
    with pytest.raises(RuntimeError, match=rf"looked for {name}\(.*\) in trl.trainer.utils, found nothing of that"):
        patch()
    check_same(before)


def changed(name: str) -> Callable[..., Any]:
    def function(logits: Tensor, index: Tensor, tau: float) -> Tensor:
        return logits

    function.__name__ = name
    return function


@pytest.mark.parametrize("name", [name for name in REPLACED if name != "add_fused_lm_head"])
def test_what_takes_something_else_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, name, changed(name))
    before = loaded()
    with pytest.raises(RuntimeError, match=rf"looked for {name}\(.*found {name}\(logits, index, tau\)"):
        patch()
    check_same(before)


def test_replacements_take_what_the_originals_take() -> None:
    """And perhaps what later versions do."""

    def parameters(name: str) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(getattr(utils, name)).parameters.values()]

    originals = {name: parameters(name) for name in REPLACED if name != "_ChunkedLogProbFunction"}
    with patch():
        for name, expected in originals.items():
            assert parameters(name)[: len(expected)] == expected
