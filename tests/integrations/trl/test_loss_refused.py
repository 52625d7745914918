"""What ``trl.loss`` refuses of a GRPOConfig, and by which name; other configurations and versions."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl

from tests.integrations.trl.test_loss_policy import config_of
from unirl_kernels.integrations import trl as ours


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


def test_other_releases_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unirl_kernels.integrations.versions.version", lambda name: "1.17.0")
    with pytest.warns(UserWarning, match=r"trl 1.17.0 was not tried, only 1.16: compare"):
        ours.loss(config_of(trl.GRPOConfig))
