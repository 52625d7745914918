"""``trl.fuse`` refuses a trainer whose loss is not TRL's own, or whose options change after it."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

from unirl_kernels.integrations.trl import FUSED, fuse, unpatch

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    unpatch()


HOOKS = ("_compute_loss", "get_off_policy_mask", "get_high_entropy_mask", "get_gamma_weights")


def test_a_method_of_ones_own_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: Any, **__: Any) -> None: ...

    def prepare(trainer: Any) -> None:
        kind = type(trainer)
        for name in HOOKS:
            subclassed = copy.copy(trainer)
            subclassed.__class__ = type("Own", (kind,), {name: own})
            for got, owner in ((subclassed, None), (trainer, trainer), (trainer, kind)):
                with monkeypatch.context() as patched:
                    if owner is not None:
                        patched.setattr(owner, name, functools.wraps(getattr(owner, name))(own))
                    with pytest.raises(TypeError, match=f"with its own {name}"):
                        fuse(got)

    run("grpo", prepare=prepare, max_steps=1)


HARMLESS_METHODS = ("get_tp_size",)
"""Methods that do not change a loss."""

CHECKED = (
    *("args", "aux_loss_enabled", "router_aux_loss_coef", "epsilon_high", "entropy_coef", "precompute_ref_logps"),
    "loss_weights",
    *("compute_loss_func", "label_smoother"),
)
"""Values that ``fuse`` checks by code, not by a table."""

HARMLESS_VALUES = (
    *("accelerator", "model", "ref_model", "current_gradient_accumulation_steps", "calculate_KL"),
    *("_entropy_bonus_enabled", "_entropy_window_stats", "_last_world_entropy"),
    *("_metrics", "_total_train_tokens", "_tp_size"),
)
"""State, logs, and what follows from options."""


def test_methods_and_options_that_the_losses_of_trl_use_are_checked() -> None:
    """By TRL's source. A method or option that a release adds is found here."""
    import trl

    for kind in FUSED:
        own = getattr(trl, kind.KIND)
        source = ast.parse(textwrap.dedent(inspect.getsource(getattr(own, kind.REPLACED))))
        uses = {
            x.attr
            for x in ast.walk(source)
            if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == "self"
        }
        methods = {x for x in uses if inspect.isroutine(getattr(own, x, None))}
        assert methods <= {kind.REPLACED, *kind.METHODS, *HARMLESS_METHODS}, kind.KIND
        assert uses - methods <= {*kind.OPTIONS, *CHECKED, *HARMLESS_VALUES}, kind.KIND


@pytest.mark.parametrize(
    ("name", "option"), [("grpo", "beta"), ("grpo", "delta"), ("dpo", "beta"), ("sft", "loss_type")]
)
def test_an_option_that_changes_after_fuse_is_found(name: str, option: str, run: Run) -> None:
    def prepare(trainer: Any) -> None:
        fuse(trainer)
        trainer.args = copy.copy(trainer.args)
        for owner in (trainer.args, trainer):
            if hasattr(owner, option):
                setattr(owner, option, 5.0)

    with pytest.raises(ValueError, match=f"trainer.args.{option} must stay"):
        run(name, prepare=prepare, max_steps=1)
