"""What ``verl.loss`` refuses, and by which name."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.integrations.verl.algorithms import losses as losses
from tests.integrations.verl.test_loss import config_of
from unirl_kernels.integrations import verl as ours


@pytest.mark.parametrize(
    ("options", "policy", "error"),
    [
        ({}, {"loss_mode": "own"}, r"ActorConfig.policy_loss.loss_mode must be one of 'vanilla', .*, got 'own'"),
        ({"kl_loss_type": "full", "use_kl_loss": True}, {}, "kl_loss_type='full' cannot be part of the loss: .*set"),
        ({"kl_loss_type": "k4", "use_kl_loss": True}, {}, "ActorConfig.kl_loss_type must be one of 'kl', .*'k4'"),
        ({"clip_ratio_low": 1.5}, {}, r"ActorConfig.clip_ratio_low must lie in \[0, 1\], got 1.5"),
        ({"clip_ratio_c": 1.0}, {}, "ActorConfig.clip_ratio_c must be above 1, got 1.0"),
        ({"entropy_coeff": "0.1"}, {}, "ActorConfig.entropy_coeff must be a number, got '0.1'"),
        ({"tau_pos": 0.0}, {"loss_mode": "sapo"}, "ActorConfig.tau_pos must be positive, got 0.0"),
        ({}, {"loss_mode": "dro", "dro_beta": None}, "ActorConfig.policy_loss.dro_beta must be a number, got None"),
        ({}, {"loss_mode": "kl_cov", "kl_cov_ratio": 0.0}, "kl_cov_ratio must be positive, got 0.0"),
        ({"global_batch_info": {"dp_size": 2}}, {}, "global_batch_info must have batch_num_tokens with dp_size=2"),
        (
            {"global_batch_info": {"batch_num_tokens": 0}},
            {},
            r"global_batch_info\['batch_num_tokens'\] must be positive",
        ),
        (
            {"global_batch_info": {"dp_size": 2, "batch_num_tokens": 9}},
            {"loss_mode": "sapo"},
            "global_batch_info must have global_batch_size with 'sapo'",
        ),
    ],
)
def test_refuses_by_name(options: dict[str, Any], policy: dict[str, Any], error: str, losses: ModuleType) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        ours.loss(config_of(losses, policy=policy, **options))


@pytest.mark.parametrize(
    ("correction", "error"),
    [
        ({"rollout_is": "batch"}, "rollout_is must be one of None, 'token', 'sequence', got 'batch'"),
        ({"rollout_is_threshold": "high"}, "rollout_is_threshold must be a positive number, .* got 'high'"),
        ({"rollout_is_threshold": "3_2"}, "rollout_is_threshold must be a positive number, or two as lower_upper"),
        ({"rollout_rs": "token_k4", "rollout_rs_threshold": 1}, "rollout_rs must be of token_k1, .*, got 'token_k4'"),
        ({"rollout_rs": "token_k1"}, "rollout_rs_threshold must have one threshold, .*, got None"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1_2"}, "rollout_rs_threshold must be a positive number"),
        ({"loss_type": "gspo"}, "rollout_correction.loss_type must be one of 'ppo_clip', 'reinforce', got 'gspo'"),
    ],
)
def test_bypass_refuses_by_name(correction: dict[str, Any], error: str, losses: ModuleType) -> None:
    policy = {"loss_mode": "bypass_mode", "rollout_correction": dict(correction)}
    with pytest.raises((TypeError, ValueError), match=error):
        ours.loss(config_of(losses, policy=policy))


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ({"loss_mode": "vanilla"}, "loss_mode='vanilla' cannot be part of the loss: rollout_correction.bypass_mode"),
        ({"loss_mode": "gspo"}, "loss_mode='gspo' cannot be part of the loss: rollout_correction.bypass_mode"),
        ({"loss_mode": "bypass_mode"}, "rollout_correction=.* cannot be part of the loss: it must be the given"),
        (
            {"loss_mode": "bypass_mode", "rollout_correction": {"loss_type": "ppo_clip"}},
            "rollout_correction=.* cannot be part of the loss: it must be the given",
        ),
    ],
)
def test_bypass_that_workers_would_not_run_is_refused(policy: dict[str, Any], error: str, losses: ModuleType) -> None:
    given = {"bypass_mode": True, "loss_type": "reinforce", "rollout_is": None, "rollout_rs": None}
    with pytest.raises(ValueError, match=error):
        ours.loss(config_of(losses, policy=policy), given)


def test_a_configuration_without_an_option_is_refused() -> None:
    with pytest.raises(TypeError, match="ActorConfig must have the option global_batch_info, got dict without it"):
        ours.loss({"loss_agg_mode": "token-mean"})


def test_other_releases_warn(losses: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unirl_kernels.integrations.versions.version", lambda name: "0.10.1")
    with pytest.warns(UserWarning, match=r"verl 0.10.1 was not tried, only 0.9: compare"):
        ours.loss(config_of(losses))


def test_normalized_weights_of_several_processes_are_refused(
    losses: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", functools.partial(bool, 1))
    correction = {"rollout_is": "token", "rollout_is_batch_normalize": True, "loss_type": "reinforce"}
    policy = {"loss_mode": "bypass_mode", "rollout_correction": correction}
    with pytest.raises(ValueError, match="rollout_is_batch_normalize=True cannot be part of the loss"):
        ours.loss(config_of(losses, policy=policy))
