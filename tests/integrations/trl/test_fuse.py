"""A GRPOTrainer whose loss is made in one pass trains as on TRL's own head: logs, samples and parameters."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

from tests.integrations.trl.heads import in_orders
from tests.integrations.trl.training import CASES, FUSED_GRPO, STEPS, Seen, differences
from unirl_kernels.integrations import one_pass
from unirl_kernels.integrations.trl import fuse, unfuse, unpatch

Run = Callable[..., Seen]
Own = Callable[[str], list[Seen]]

ORDERS = 4
QUICK = ("grpo", "grpo-sequences", "grpo-adaptive")
CASES_HERE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FUSED_GRPO]


@pytest.fixture(scope="module")
def own(run: Run) -> Own:
    """A case on TRL's own head, as it is and in orders that change from call to call.

    Here the policy's log-probabilities come from another kernel than those of the reference, so that a KL of equal
    models is rounding and not 0.
    """

    @functools.cache
    def train(name: str) -> list[Seen]:
        unpatch()  # fuse leaves its patch
        orders = (itertools.count(1000 * k) for k in range(ORDERS))
        return [run(name), *(run(name, partial(in_orders, seeds)) for seeds in orders)]

    return train


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    unpatch()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Each loss that was made in one pass; two matmuls more would be a second pass of the head."""
    losses: list[Tensor] = []
    make = one_pass.fused_linear_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = make(*args, **kwargs)
        losses.append(out.loss)
        return out

    monkeypatch.setattr(one_pass, "fused_linear_loss", counted)
    return losses


@pytest.mark.parametrize("name", CASES_HERE)
def test_trains_as_with_its_own_head(name: str, run: Run, own: Own, made: list[Tensor]) -> None:
    got = run(name, prepare=fuse)
    assert len(made) >= 2 * STEPS
    assert all(loss.requires_grad for loss in made)
    assert differences(got, own(name)) == []
    steps = own(name)[0].logs[:-1]
    for key in ("loss", "grad_norm", *CASES[name].logged):
        assert any(log.get(key, 0.0) != 0 for log in steps), key


def test_slightly_wrong_gradient_would_show(run: Run, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = one_pass.OnePass.loss
    off = property(lambda work: loss.fget(work).detach() + 1.0001 * (loss.fget(work) - loss.fget(work).detach()))
    monkeypatch.setattr(one_pass.OnePass, "loss", off)
    assert any(line.startswith("grad_norm of step 1") for line in differences(run("grpo", prepare=fuse), own("grpo")))


def test_slightly_wrong_log_probability_would_show(run: Run, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    make = one_pass.OnePass.run

    def off(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logp, entropy = make(*args, **kwargs)
        return logp * 1.0001, entropy

    monkeypatch.setattr(one_pass.OnePass, "run", off)
    assert any(line.startswith("kl of step") for line in differences(run("grpo", prepare=fuse), own("grpo")))


def with_tools(trainer: Any) -> None:
    """As if every third token of a completion were a tool's output."""
    generate = trainer._generate_and_score_completions

    def generated(*args: Any) -> Any:
        inputs = generate(*args)
        inputs["tool_mask"] = (torch.arange(inputs["completion_ids"].shape[1]) % 3 != 2).long().expand(8, -1)
        return inputs

    trainer._generate_and_score_completions = generated


def test_output_of_tools_is_left_out(run: Run) -> None:
    plain, *others = (
        run("grpo", head, prepare=with_tools)
        for head in (nullcontext, *(partial(in_orders, itertools.count(1000 * k)) for k in range(ORDERS)))
    )

    def prepare(trainer: Any) -> None:
        with_tools(trainer)
        fuse(trainer)

    got = run("grpo", prepare=prepare)
    assert differences(got, [plain, *others]) == []
    assert differences(got, [run("grpo")]) != []


def test_evaluates_and_gives_the_loss_back(run: Run) -> None:
    def prepare(trainer: Any) -> None:
        def evaluated() -> dict[str, float]:
            torch.manual_seed(0)
            found = trainer.evaluate(trainer.train_dataset)
            return {name: x for name, x in found.items() if not name.endswith(("runtime", "per_second"))}

        expected = evaluated()
        fuse(trainer)
        got = evaluated()
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert got["eval_loss"] != 0
        unfuse(trainer)
        unpatch()
        assert "_compute_loss" not in vars(trainer)
        assert evaluated() == expected
        fuse(trainer)
        unpatch()  # its head is gone, but not its loss
        with pytest.raises(RuntimeError, match="did not call the head"):
            evaluated()
        unfuse(trainer)
        unfuse(trainer)

    run("grpo", prepare=prepare, beta=0.0, max_steps=1)


REFUSED = {
    "label": (TypeError, "must be a GRPOTrainer of TRL, got SimpleNamespace"),
    "_compute_loss": (TypeError, "with its own _compute_loss"),
    "n_gpu": (ValueError, "n_gpu must be at most 1"),
    "torch_compile": (ValueError, "torch_compile must be False"),
    "aux_loss_enabled": (ValueError, "router_aux_loss_coef must be 0.0"),
    "beta": (ValueError, r"trainer.beta must be trainer.args.beta = 0.04, got 0.5"),
    "entropy_coef": (ValueError, "trainer.entropy_coef must be"),
    "rollout_func": (ValueError, "off_policy_mask_threshold=0.5 goes by"),
    "sequence_mask": (ValueError, "vllm_importance_sampling_mode must be one of"),
}


def test_what_one_pass_cannot_do_is_refused_by_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(trainer: Any, name: str) -> None:
        kind, text = REFUSED[name]
        with pytest.raises(kind, match=text):
            fuse(trainer)
        assert not isinstance(vars(trainer).get("_compute_loss"), MethodType)

    def prepare(trainer: Any) -> None:
        refused(SimpleNamespace(args=trainer.args), "label")
        own = type("Own", (type(trainer),), {"_compute_loss": lambda *_: None})
        refused(object.__new__(own), "_compute_loss")
        for name, value in {"n_gpu": 2, "torch_compile": True, "off_policy_mask_threshold": 0.5}.items():
            with monkeypatch.context() as patched:
                if name == "n_gpu":
                    patched.setattr(type(trainer.args), "n_gpu", value)
                else:
                    patched.setattr(trainer.args, name, value)
                if name == "off_policy_mask_threshold":
                    patched.setattr(trainer, name, value)
                    patched.setattr(trainer, "rollout_func", print)
                refused(trainer, "rollout_func" if name == "off_policy_mask_threshold" else name)
        for name, value in {"aux_loss_enabled": True, "beta": 0.5, "entropy_coef": 0.5}.items():
            with monkeypatch.context() as patched:
                patched.setattr(trainer, name, value)
                refused(trainer, name)
        for name, value in {"loss_type": "vespo", "use_vllm": True}.items():
            monkeypatch.setattr(trainer.args, name, value)
            monkeypatch.setattr(trainer, name, value)
        refused(trainer, "sequence_mask")
        monkeypatch.undo()

    run("grpo", prepare=prepare, max_steps=1)
