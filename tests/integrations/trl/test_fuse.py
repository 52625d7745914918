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
from tests.integrations.trl.training import CASES, FUSABLE, STEPS, Seen, differences
from unirl_kernels.integrations import one_pass
from unirl_kernels.integrations.trl import fuse, unfuse, unpatch

Run = Callable[..., Seen]
Own = Callable[[str], list[Seen]]

ORDERS = 4
QUICK = ("grpo", "grpo-sequences", "grpo-adaptive", "rloo", "dpo", "kto", "sft")
CASES_HERE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FUSABLE]


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

    def counting(make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            found = make(*args, **kwargs)
            losses.append((found[0] if isinstance(found, tuple) else found).loss)
            return found

        return counted

    for name in ("fused_linear_loss", "observed_linear_loss"):
        monkeypatch.setattr(one_pass, name, counting(getattr(one_pass, name)))
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


def check_changed(name: str, change: Callable[[Any], None], run: Run, **options: Any) -> None:
    """Compare runs of a changed trainer. The change shows in what is trained."""
    heads = (nullcontext, *(partial(in_orders, itertools.count(1000 * k)) for k in range(ORDERS)))
    own = [run(name, head, prepare=change, **options) for head in heads]

    def prepare(trainer: Any) -> None:
        change(trainer)
        fuse(trainer)

    assert differences(run(name, prepare=prepare, **options), own) == []
    assert differences(run(name, **options), own) != []


def test_output_of_tools_is_left_out(run: Run) -> None:
    check_changed("grpo", with_tools, run)


def with_vllm(trainer: Any) -> None:
    """As if vLLM had sampled with probabilities of its own."""
    generate, by_sequence = trainer._generate_and_score_completions, trainer.vllm_importance_sampling_mode
    weights = torch.Generator().manual_seed(0)

    def generated(*args: Any) -> Any:
        trainer.use_vllm = False
        inputs = generate(*args)
        trainer.use_vllm = True
        n, length = inputs["completion_ids"].shape
        shape = (n, 1 if by_sequence.startswith("sequence") else length)
        inputs["importance_sampling_ratio"] = 0.5 + torch.rand(shape, generator=weights)
        return inputs

    trainer._generate_and_score_completions = generated
    trainer.use_vllm = trainer.args.use_vllm = True


@pytest.mark.parametrize(
    ("kind", "mode"), [("grpo", "token_truncate"), ("grpo", "sequence_mask"), ("vespo", "token_truncate")]
)
def test_weights_of_vllm_are_those_of_the_trainer(kind: str, mode: str, run: Run) -> None:
    check_changed("grpo", with_vllm, run, loss_type=kind, vllm_importance_sampling_mode=mode)


def with_as_many_tokens_as_sequences(trainer: Any) -> None:
    """As if a micro-batch had as many tokens as sequences, some of them empty."""
    prepare = trainer._prepare_inputs

    def prepared(inputs: Any) -> Any:
        inputs = {**prepare(inputs)}
        mask = inputs["completion_mask"]
        left = torch.tensor([2, 0, 1, 1])[torch.arange(len(mask)) % 4, None]
        inputs["completion_mask"] = mask * (mask.cumsum(1) <= left)
        assert inputs["completion_mask"].sum() == len(mask)
        if "old_logps" in inputs:
            inputs["old_logps"] = inputs["old_logps"] * left[:, 0] / mask.sum(1)
        return inputs

    trainer._prepare_inputs = prepared


@pytest.mark.parametrize("name", ["grpo", "grpo-sequences", "rloo", "dpo", "kto"])
def test_as_many_tokens_as_sequences(name: str, run: Run) -> None:
    check_changed(name, with_as_many_tokens_as_sequences, run)


def without_some(trainer: Any) -> None:
    """As if every third completion were truncated, and masked."""
    generate = trainer._generate_and_score_completions

    def generated(*args: Any) -> Any:
        inputs = generate(*args)
        inputs["completion_mask"][::3] = 0
        inputs["old_logps"][::3] = 0
        return inputs

    trainer._generate_and_score_completions = generated


def test_masked_completions_add_what_they_add_in_trl(run: Run) -> None:
    check_changed("rloo", without_some, run)


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
    "label": (TypeError, "must be one of GRPOTrainer, .*SFTTrainer of TRL, got SimpleNamespace"),
    "_compute_loss": (TypeError, "with its own _compute_loss"),
    "n_gpu": (ValueError, "n_gpu must be at most 1"),
    "torch_compile": (ValueError, "torch_compile must be False"),
    "aux_loss_enabled": (ValueError, "router_aux_loss_coef must be 0.0"),
    "beta": (ValueError, r"trainer.beta must be trainer.args.beta = 0.04, got 0.5"),
    "epsilon_high": (ValueError, r"trainer.epsilon_high must be trainer.args.epsilon = 0.2, got 5.0"),
    "vllm_importance_sampling_clip_max": (ValueError, "trainer.vllm_importance_sampling_clip_max must be"),
    "entropy_coef": (ValueError, "trainer.entropy_coef must be"),
    "is_fsdp_enabled": (ValueError, "must not run FSDP, whose weights or sequences are not whole"),
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
        for name, value in {
            "aux_loss_enabled": True,
            "beta": 0.5,
            "epsilon_high": 5.0,
            "vllm_importance_sampling_clip_max": 1.0,
            "entropy_coef": 0.5,
            "is_fsdp_enabled": True,
        }.items():
            with monkeypatch.context() as patched:
                patched.setattr(trainer, name, value)
                refused(trainer, name)
        for name, value in {"loss_type": "vespo", "use_vllm": True}.items():
            monkeypatch.setattr(trainer.args, name, value)
            monkeypatch.setattr(trainer, name, value)
        refused(trainer, "sequence_mask")
        monkeypatch.undo()

    run("grpo", prepare=prepare, max_steps=1)


OTHERS: list[tuple[str, str, Any, str]] = [
    ("sft", "args.label_smoothing_factor", 0.1, "label_smoothing_factor=0.1 cannot be part"),
    ("sft", "compute_loss_func", print, "compute_loss_func must be None"),
    ("sft", "args.router_aux_loss_coef", 0.5, "router_aux_loss_coef=0.5 cannot be part"),
    ("dpo", "args.use_weighting", True, "trainer.use_weighting must be"),
    ("dpo", "loss_weights", [2.0], "loss_weights must be trainer.args.loss_weights"),
    ("dpo", "precompute_ref_logps", True, "precompute_ref_logps must be"),
    ("dpo", "ld_alpha", 0.5, "ld_alpha must be trainer.args.ld_alpha = None, got 0.5"),
    ("kto", "_is_vision_dataset", True, "must learn from text"),
    ("kto", "desirable_weight", 3.0, "desirable_weight must be"),
    ("dpo", "args.truncation_mode", "keep_end", "truncation_mode must be 'keep_start' with loss_type 'ipo'"),
    ("rloo", "epsilon_low", 0.5, "epsilon_low must be trainer.args.epsilon = 0.2"),
    ("rloo", "epsilon_high", 0.5, "epsilon_high must be trainer.args.epsilon = 0.2"),
]


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "rloo"])
def test_what_one_pass_cannot_do_of_others(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(trainer: Any) -> None:
        for _, option, value, text in [item for item in OTHERS if item[0] == name]:
            owner = trainer.args if option.startswith("args.") else trainer
            with monkeypatch.context() as patched:
                if value == "keep_end":
                    patched.setattr(trainer.args, "loss_type", ["ipo"])
                    patched.setattr(trainer, "loss_types", ["ipo"])
                    patched.setattr(trainer.args, "max_length", 16)
                patched.setattr(owner, option.removeprefix("args."), value)
                with pytest.raises(ValueError, match=text):
                    fuse(trainer)
            assert not {"compute_loss", "_compute_loss"} & set(vars(trainer))

    run(name, prepare=prepare, max_steps=1)


def test_weights_of_pairs_are_refused(run: Run) -> None:
    def prepare(trainer: Any) -> None:
        with pytest.raises(ValueError, match="use_weighting must be False"):
            fuse(trainer)

    run("dpo-weighted", prepare=prepare, max_steps=1)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto"])
def test_others_evaluate(name: str, run: Run) -> None:
    def prepare(trainer: Any) -> None:
        def evaluated() -> dict[str, float]:
            found = trainer.evaluate(trainer.train_dataset)
            return {name: x for name, x in found.items() if not name.endswith(("runtime", "per_second"))}

        expected = evaluated()
        fuse(trainer)
        assert evaluated() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert expected["eval_loss"] != 0
        unfuse(trainer)
        unpatch()
        assert evaluated() == expected

    run(name, prepare=prepare, max_steps=1)


SLIGHTLY_OFF = {"rloo": "entropy", "dpo": "logps/chosen", "kto": "logps/chosen", "sft": "loss"}
"""Where it shows when what a pass gives is off."""


@pytest.mark.parametrize("name", SLIGHTLY_OFF)
def test_slightly_wrong_values_of_others_would_show(
    name: str, run: Run, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(make: Callable[..., Any]) -> Callable[..., Any]:
        def off(*args: Any, **kwargs: Any) -> Any:
            found = make(*args, **kwargs)
            if isinstance(found, one_pass.TokenObservations):
                return found._replace(logp=found.logp * 1.0001)
            return found[0], found[1] * 1.0001

        return off

    loss = one_pass.OnePass.loss.fget
    assert loss is not None
    monkeypatch.setattr(one_pass.OnePass, "run", scaled(one_pass.OnePass.run))
    monkeypatch.setattr(one_pass.OnePass, "observe", scaled(one_pass.OnePass.observe))
    if name == "sft":
        monkeypatch.setattr(one_pass.OnePass, "loss", property(lambda work: loss(work) * 1.0001))
    assert any(line.startswith(SLIGHTLY_OFF[name]) for line in differences(run(name, prepare=fuse), own(name)))


@pytest.mark.parametrize("name", ["rloo", "dpo", "kto", "sft"])
def test_slightly_wrong_gradient_of_others_would_show(
    name: str, run: Run, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = one_pass.OnePass.loss.fget
    assert loss is not None
    off = property(lambda work: loss(work).detach() + 1.0001 * (loss(work) - loss(work).detach()))
    monkeypatch.setattr(one_pass.OnePass, "loss", off)
    assert any(line.startswith("grad_norm of step 1") for line in differences(run(name, prepare=fuse), own(name)))


def test_trains_an_adapter_against_the_model_without_it(run: Run) -> None:
    """LoRA: the reference of DPO is the model without the adapter, whose head is called first."""
    peft = pytest.importorskip("peft")

    def adapted(trainer: Any) -> None:
        assert trainer.ref_model is None

    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain, *others = (
        run("dpo", head, prepare=adapted, peft_config=adapter)
        for head in (nullcontext, *(partial(in_orders, itertools.count(1000 * k)) for k in range(ORDERS)))
    )
    got = run("dpo", prepare=lambda trainer: (adapted(trainer), fuse(trainer)), peft_config=adapter)
    assert differences(got, [plain, *others]) == []
    assert plain.logs[0]["rewards/margins"] != 0
