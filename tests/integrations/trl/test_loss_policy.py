"""``trl.loss`` of GRPOConfig and RLOOConfig: TRL's own losses, gradients and logs."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl

import unirl_kernels as uk
from tests.integrations.trainers import Scored, V, check, scored
from unirl_kernels.integrations import trl as ours
from unirl_kernels.testing.budgets import condition_of, violations

B, L = 4, 6
LENGTHS = torch.tensor([6, 3, 5, 0])
ACCUMULATION = 2
PLAIN = {"report_to": [], "use_cpu": True, "bf16": False, "output_dir": "unused"}


def config_of(kind: Any, **options: Any) -> Any:
    return kind(**PLAIN, gradient_accumulation_steps=ACCUMULATION, num_generations=2, **options)


class Accelerator:
    """Of one process."""

    num_processes = 1
    sync_gradients = True
    device = torch.device("cpu")
    parallelism_config = None

    def autocast(self) -> Any:
        return nullcontext()

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x

    def pad_across_processes(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x


@pytest.fixture
def given() -> dict[str, Any]:
    target = torch.where(torch.arange(L) < LENGTHS.unsqueeze(-1), torch.randint(V, (B, L)), uk.IGNORE)
    target[0, 2] = uk.IGNORE  # tool output
    logits = 2 * torch.randn(B, L, V, dtype=torch.float64)
    logp = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    old = logp + 0.4 * torch.randn(B, L)
    rollout = old + 0.3 * torch.randn(B, L)
    rollout[2, 1] = math.nan
    return {
        "logits": logits,
        "target": target,
        "advantages": torch.tensor([1.3, -0.7, -1.1, 0.4], dtype=torch.float64),
        "old": old,
        "ref": logp + 0.5 * torch.randn(B, L),
        "rollout": rollout,
        "num_items_in_batch": torch.tensor(29),
        "entropy_coef": torch.tensor(0.03, dtype=torch.float64),
    }


def trainer_of(kind: Any, config: Any, tokens: Scored) -> Any:
    """A trainer without a model: its head gives ``tokens``."""
    trainer = object.__new__(kind)
    values = {name: getattr(config, name) for name in vars(config) if not hasattr(kind, name)}
    vars(trainer).update(values)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    vars(trainer).update(
        args=config,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        epsilon_low=config.epsilon,
        epsilon_high=high,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=config.gradient_accumulation_steps,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (tokens.logp, tokens.entropy, None),
        _metrics={"train": defaultdict(list)},
    )
    return trainer


def rollout_ratio(trainer: Any, mask: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    """TRL's own lines on vLLM's samples, which stand in the middle of its scoring."""
    source = inspect.getsource(trl.GRPOTrainer._generate_and_score_completions)
    begin = source.index("            if self.use_vllm and self.vllm_importance_sampling_correction:\n")
    end = source.index("            # Compute the per-token log probabilities for the reference model")
    names = {"self": trainer, "torch": torch, "math": math, "completion_mask": mask, "tool_mask": None}
    names |= {"old_per_token_logps": old, "sampling_per_token_logps": rollout}
    exec(textwrap.dedent(source[begin:end]), names)
    return names["vllm_importance_sampling_ratio"]  # type: ignore[return-value]


def theirs(config: Any, on_policy: bool = False) -> Any:
    def run(tokens: Scored, given: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        kind = trl.RLOOTrainer if isinstance(config, trl.RLOOConfig) else trl.GRPOTrainer
        trainer = trainer_of(kind, config, tokens)
        mask = tokens.mask.to(tokens.logp.dtype)
        ids = given["target"].clamp(min=0)
        inputs = {"prompt_ids": ids[:, :0], "prompt_mask": mask[:, :0], "completion_ids": ids, "completion_mask": mask}
        inputs |= {name: given[name] for name in ("advantages", "num_items_in_batch")}
        inputs["ref_per_token_logps"] = given["ref"]
        if not on_policy:
            inputs["old_per_token_logps"] = given["old"]
            inputs["old_logps"] = (given["old"] * mask).sum(1)
        if kind is trl.GRPOTrainer:
            coefficient = given["entropy_coef"].item() if config.use_adaptive_entropy else config.entropy_coef
            trainer.entropy_coef = coefficient
            trainer._entropy_bonus_enabled = config.use_adaptive_entropy or coefficient != 0
            trainer._last_world_entropy, trainer._entropy_window_stats = -1.0, None
            if config.use_vllm:
                inputs["sampling_per_token_logps"] = given["rollout"]
                if config.vllm_importance_sampling_correction:
                    inputs["importance_sampling_ratio"] = rollout_ratio(trainer, mask, given["old"], given["rollout"])
        loss = trainer._compute_loss(trainer.model, inputs)
        metrics = {name: x[0] for name, x in trainer._metrics["train"].items()}
        return loss, {name: x for name, x in metrics.items() if name not in ("policy_loss", "entropy_coef")}

    return run


def compare(config: Any, given: dict[str, Any], on_policy: bool = False) -> None:
    loss = ours.loss(config)
    own = theirs(config, on_policy)
    names = set(own(scored_of(given), given)[1])

    def batch_of(x: dict[str, Any]) -> uk.Batch:
        old = None if on_policy else x["old"]
        fields = {"rollout_logp": x["rollout"]}
        fields |= {name: x[name] for name in ("num_items_in_batch", "entropy_coef")}
        return uk.Batch(x["target"], x["advantages"], old, x["ref"], fields=fields)

    check(
        loss,
        own,
        given["logits"],
        given["target"],
        {name: x for name, x in given.items() if name != "logits"},
        batch_of,
        lambda out: {name: x for name, x in out.metrics.items() if name in names},
    )


def scored_of(given: dict[str, Any]) -> Scored:
    return scored(given["logits"], given["target"])


KINDS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
VLLM = {"use_vllm": True, "vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.2}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_grpo_loss_types(kind: str, level: str, given: dict[str, Any]) -> None:
    compare(config_of(trl.GRPOConfig, loss_type=kind, importance_sampling_level=level), given)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.1, "epsilon_high": 0.4, "delta": 1.3},
        {"beta": 0.2, "use_bias_correction_kl": False},
        {"beta": 0.2, "use_bias_correction_kl": True},
        {"off_policy_mask_threshold": 0.05},
        {"top_entropy_quantile": 0.4},
        {"entropy_coef": 0.1},
        {"entropy_coef": -0.1, "top_entropy_quantile": 0.4, "beta": 0.1},
        {"use_adaptive_entropy": True, "top_entropy_quantile": 0.6},
        {"steps_per_generation": 6},
        {"max_completion_length": 9, "loss_type": "dr_grpo"},
        {"epsilon_high": 1.1, "loss_type": "cispo"},
        {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0, "loss_type": "sapo"},
        {
            "vespo_k_pos": 1.0,
            "vespo_lambda_pos": 0.0,
            "vespo_k_neg": 0.5,
            "vespo_lambda_neg": 1.0,
            "loss_type": "vespo",
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_grpo_options(options: dict[str, Any], level: str, given: dict[str, Any]) -> None:
    compare(config_of(trl.GRPOConfig, importance_sampling_level=level, **options), given)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "vespo"])
@pytest.mark.parametrize("mode", MODES)
def test_grpo_vllm_correction(mode: str, kind: str, given: dict[str, Any]) -> None:
    config = config_of(trl.GRPOConfig, loss_type=kind, beta=0.1, vllm_importance_sampling_mode=mode, **VLLM)
    if kind == "vespo" and mode.startswith("sequence"):
        with pytest.raises(ValueError, match="vllm_importance_sampling_mode must be one of 'token_truncate'"):
            ours.loss(config)
    else:
        compare(config, given)


def test_grpo_vllm_bounds_may_be_missing(given: dict[str, Any]) -> None:
    bounds = {"vllm_importance_sampling_clip_max": None, "vllm_importance_sampling_mode": "token_mask"}
    compare(config_of(trl.GRPOConfig, use_vllm=True, **bounds), given)


def test_grpo_off_policy_mask_of_vllm(given: dict[str, Any]) -> None:
    options = {"use_vllm": True, "vllm_importance_sampling_correction": False}
    compare(config_of(trl.GRPOConfig, off_policy_mask_threshold=0.03, **options), given)


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_on_policy(kind: str, given: dict[str, Any]) -> None:
    compare(config_of(trl.GRPOConfig, loss_type=kind, beta=0.1), given, on_policy=True)


def test_grpo_has_the_policy_loss_as_a_term(given: dict[str, Any]) -> None:
    loss = ours.loss(config_of(trl.GRPOConfig, entropy_coef=0.1, loss_type="grpo"))
    out = uk.fused_loss(given["logits"], uk.Batch(given["target"], given["advantages"], given["old"]), loss)
    alone, _ = theirs(config_of(trl.GRPOConfig, loss_type="grpo"))(scored_of(given), given)
    policy, _ = out.terms
    assert not violations(policy, alone.float(), alone.double(), condition=condition_of(alone.double(), 10.0))


def test_rloo(given: dict[str, Any]) -> None:
    given["logits"], given["target"] = given["logits"][:3], given["target"][:3]
    given = {name: x[:3] if isinstance(x, Tensor) and x.dim() else x for name, x in given.items()}
    compare(config_of(trl.RLOOConfig, epsilon=0.1, epsilon_high=0.3), given)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("loss_type", "ppo", "GRPOConfig.loss_type must be one of 'grpo', .*, got 'ppo'"),
        ("importance_sampling_level", "word", "importance_sampling_level must be one of 'token', 'sequence'"),
        ("epsilon", 1.5, r"GRPOConfig.epsilon must lie in \[0, 1\], got 1.5"),
        ("epsilon_high", -0.1, "epsilon_high must be at least 0, got -0.1"),
        ("delta", 0.5, "delta must be above 1, got 0.5"),
        ("beta", "0.1", "beta must be a number, got '0.1'"),
        ("router_aux_loss_coef", 0.01, "router_aux_loss_coef=0.01 cannot be part of the loss: .*; set it to 0.0"),
        ("use_bias_correction_kl", 1, "use_bias_correction_kl must be True or False, got 1"),
        ("top_entropy_quantile", 1.2, r"top_entropy_quantile must lie in \[0, 1\]"),
        ("max_completion_length", None, "max_completion_length must be a number, got None"),
        ("vllm_importance_sampling_mode", "all", "vllm_importance_sampling_mode must be one of 'token_truncate', .*"),
    ],
)
def test_grpo_refuses_by_name(option: str, value: Any, error: str) -> None:
    config = config_of(trl.GRPOConfig, beta=0.1, use_vllm=True, loss_type="dr_grpo")
    setattr(config, option, value)
    with pytest.raises((TypeError, ValueError), match=error):
        ours.loss(config)


def test_grpo_refuses_a_quantile_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(trl.GRPOConfig, top_entropy_quantile=0.5)
    monkeypatch.setattr(trl.GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"top_entropy_quantile=0.5 cannot be part of the loss: .*; set 1.0"):
        ours.loss(config)


def test_grpo_counts_tokens_of_all_processes(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(trl.GRPOConfig)
    monkeypatch.setattr(trl.GRPOConfig, "world_size", 3)
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    compare(config, given)


@pytest.mark.parametrize("bound", [{"clip_min": 1.1}, {"clip_max": 0.9}])
def test_vespo_needs_one_within_the_bounds(bound: dict[str, float]) -> None:
    named = {f"vllm_importance_sampling_{name}": x for name, x in bound.items()}
    mode = {"vllm_importance_sampling_mode": "token_mask", "use_vllm": True}
    with pytest.raises(ValueError, match=r"vllm_importance_sampling_clip_m.* cannot be part of the loss"):
        ours.loss(config_of(trl.GRPOConfig, loss_type="vespo", **mode, **named))


def test_other_configurations_are_refused() -> None:
    from trl.experimental.gmpo import GMPOConfig

    with pytest.raises(TypeError, match=r"config must be one of GRPOConfig, .*, got trl.experimental.gmpo"):
        ours.loss(config_of(GMPOConfig))
    with pytest.raises(TypeError, match=r"config must be one of GRPOConfig, .*, got dict"):
        ours.loss({"loss_type": "grpo"})


def test_a_derived_configuration_is_known() -> None:
    class Own(trl.GRPOConfig):
        pass

    assert ours.loss(config_of(Own)) == ours.loss(config_of(trl.GRPOConfig))


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unirl_kernels.integrations.losses.trl.version", lambda name: "1.17.0")
    with pytest.raises(RuntimeError, match=r"trl must be of version 1.16, .*, got 1.17.0"):
        ours.loss(config_of(trl.GRPOConfig))
