"""``verl.loss``: verl's own losses, gradients and logs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import unirl_kernels as uk
from tests.integrations.trainers import Scored, V, check, check_layouts
from tests.integrations.verl.algorithms import Data
from tests.integrations.verl.algorithms import losses as losses
from unirl_kernels.integrations import verl as ours
from unirl_kernels.objectives import ClipCov, Tokens

B, L = 5, 6
LENGTHS = torch.tensor([6, 3, 5, 0, 4])
MODES = (
    *("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo"),
    "bypass_mode",
)
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PENALTIES = (
    "kl",
    "k1",
    "abs",
    "mse",
    "k2",
    "low_var_kl",
    "k3",
    "kl+",
    "k1+",
    "abs+",
    "mse+",
    "k2+",
    "low_var_kl+",
    "k3+",
)
REJECTIONS = {
    "token_k1": "0.8_1.3",
    "token_k2": 0.03,
    "token_k3": 0.03,
    "seq_sum_k1": "0.7_1.6",
    "seq_sum_k2": 0.15,
    "seq_sum_k3": 0.15,
    "seq_mean_k1": "0.9_1.1",
    "seq_mean_k2": "0.06",
    "seq_mean_k3": 0.06,
    "seq_max_k2": 0.09,
    "seq_max_k3": 0.09,
}


@pytest.fixture
def given() -> dict[str, Any]:
    target = torch.where(torch.arange(L) < LENGTHS.unsqueeze(-1), torch.randint(V, (B, L)), uk.IGNORE)
    target[0, 2] = uk.IGNORE
    logits = 2 * torch.randn(B, L, V, dtype=torch.float64)
    logp = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return {
        "logits": logits,
        "target": target,
        "advantage": torch.randn(B, 1).expand(B, L).double(),
        "old": logp + 0.3 * torch.randn(B, L),
        "ref": logp + 0.5 * torch.randn(B, L),
        "weights": torch.rand(B, L).double() + 0.2,
        "random": torch.rand(B, L).double(),
    }


def config_of(losses: ModuleType, *, policy: dict[str, Any] | None = None, **options: Any) -> Any:
    actor = __import__("verl.workers.config.actor", fromlist=["actor"])
    correction = actor.RolloutCorrectionConfig(**(policy or {}).pop("rollout_correction", {}))
    own = actor.PolicyLossConfig(**{"dro_beta": 0.3, **(policy or {})}, rollout_correction=correction)
    return actor.ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=1, policy_loss=own, **options)


def theirs(losses: ModuleType, config: Any, counts: dict[str, Any], weighted: bool) -> Any:
    def run(tokens: Scored, given: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        names = ("dp_size", "batch_num_tokens", "global_batch_size")
        data = Data({"dp_size": 1, **dict.fromkeys(names[1:]), **counts})
        data |= {"response_mask": tokens.mask, "old_log_probs": given["old"], "advantages": given["advantage"]}
        data["ref_log_prob"] = given["ref"]
        if weighted:
            data["rollout_is_weights"] = given["weights"]
        output = {"log_probs": tokens.logp, "entropy": tokens.entropy if config.entropy_coeff else None}
        loss, metrics = losses.ppo_loss(config, output, Data(data))
        values = {name: getattr(x, "values", x) for name, x in metrics.items() if name != "kl_coef"}
        values = {name: x[0] if isinstance(x, list) else x for name, x in values.items()}
        return loss, {name: float(x) for name, x in values.items() if not name.startswith("rollout_corr")}

    return run


def compare(
    losses: ModuleType,
    config: Any,
    given: dict[str, Any],
    counts: dict[str, Any] | None = None,
    correction: Any = None,
) -> None:
    counts = counts or {}
    config.global_batch_info.update(counts)
    loss = ours.loss(config, correction)
    weighted = correction is not None and not correction.bypass_mode

    def batch_of(x: dict[str, Any]) -> uk.Batch:
        fields = {"rollout_is_weights": x["weights"], "random": x["random"]}
        return uk.Batch(x["target"], x["advantage"], x["old"], x["ref"], fields=fields)

    def same(out: uk.LossOutput) -> dict[str, Tensor]:
        found = {name: x for name, x in out.metrics.items() if name.startswith("actor/")}
        terms = list(out.terms)
        found["actor/pg_loss"] = terms.pop(0)
        if config.entropy_coeff:
            found["actor/entropy_loss"] = terms.pop(0) / -config.entropy_coeff
        if config.use_kl_loss:
            found["kl_loss"] = terms.pop(0) / config.kl_loss_coef
        return found

    own = theirs(losses, config, counts, weighted)
    reads = {name: x for name, x in given.items() if name != "logits"}
    check(loss, own, given["logits"], given["target"], reads, batch_of, same)


@pytest.fixture
def chosen_alike(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's permutation is that of the field ``random``."""
    batch = uk.Batch(given["target"], given["advantage"], given["old"])
    stats = uk.token_stats(given["logits"], given["target"])
    found = ClipCov(least=-1.0, most=1.0)._left_out(Tokens(batch, *stats)) & batch.valid.reshape(-1)
    order = torch.argsort(given["random"].reshape(-1)[found])
    assert len(order) > 3
    monkeypatch.setattr(torch, "randperm", lambda n: order if n == len(order) else pytest.fail(f"{n}"))


COV = {"clip_cov_lb": -1.0, "clip_cov_ub": 1.0, "clip_cov_ratio": 0.2, "kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_policy_losses(
    mode: str, aggregation: str, losses: ModuleType, given: dict[str, Any], chosen_alike: None
) -> None:
    compare(losses, config_of(losses, policy={"loss_mode": mode, **COV}, loss_agg_mode=aggregation), given)


@pytest.mark.parametrize("mode", MODES)
def test_options_of_policy_losses(mode: str, losses: ModuleType, given: dict[str, Any], chosen_alike: None) -> None:
    bounds = {"clip_ratio_low": None, "clip_ratio_high": 0.15, "clip_ratio": 0.2 if mode == "clip_cov" else 0.05}
    bounds["clip_ratio_high"] = 0.2 if mode == "clip_cov" else 0.15
    config = config_of(losses, policy={"loss_mode": mode, **COV}, clip_ratio_c=1.2, tau_pos=0.7, tau_neg=1.9, **bounds)
    compare(losses, config, given)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("geo_mean", "clip_cov")])
def test_advantages_of_tokens(mode: str, losses: ModuleType, given: dict[str, Any]) -> None:
    given["advantage"] = torch.randn(B, L).double()
    compare(losses, config_of(losses, policy={"loss_mode": mode, **COV}), given)


@pytest.mark.parametrize("far", [-25.0, 25.0])
@pytest.mark.parametrize("mode", ["vanilla", "dppo_tv", "dppo_kl", "sapo", "cispo"])
def test_ratios_beyond_verls_bound(mode: str, far: float, losses: ModuleType, given: dict[str, Any]) -> None:
    given["old"][0, 0] -= far
    given["old"][2, 1] -= far
    given["advantage"] = given["advantage"].abs() * torch.tensor([1.0, 1, -1, 1, 1], dtype=torch.float64).unsqueeze(-1)
    compare(losses, config_of(losses, policy={"loss_mode": mode}), given)


@pytest.mark.parametrize("mode", ["dppo_tv", "dppo_kl"])
def test_truncated_outside_of_the_trust_region(mode: str, losses: ModuleType, given: dict[str, Any]) -> None:
    given["advantage"] = given["advantage"].abs()
    given["logits"][0, 0, given["target"][0, 0]] += 8.0
    logp = torch.log_softmax(given["logits"][0, 0], -1)[given["target"][0, 0]]
    given["old"][0, 0] = logp - 1.5  # the ratio is beyond 3, and the probability has risen by more than 0.2
    compare(losses, config_of(losses, policy={"loss_mode": mode}), given)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_counts_of_the_step(aggregation: str, losses: ModuleType, given: dict[str, Any]) -> None:
    config = config_of(losses, loss_agg_mode=aggregation, loss_scale_factor=17, entropy_coeff=0.1, use_kl_loss=True)
    compare(losses, config, given, {"dp_size": 4, "batch_num_tokens": 90, "global_batch_size": 24})


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalties(kind: str, losses: ModuleType, given: dict[str, Any]) -> None:
    given["ref"][0, 0] += 4.0  # beyond the bound of low_var_kl
    config = config_of(losses, use_kl_loss=True, kl_loss_coef=0.4, kl_loss_type=kind, entropy_coeff=0.05)
    compare(losses, config, given)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bypass_mode"])
def test_weights_of_rollouts(mode: str, losses: ModuleType, given: dict[str, Any], chosen_alike: None) -> None:
    config = config_of(losses, policy={"loss_mode": mode, **COV}, entropy_coeff=0.1)
    compare(losses, config, given, correction=config.policy_loss.rollout_correction)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("threshold", [1.2, "1.2", "0.8_1.2"])
@pytest.mark.parametrize("level", ["token", "sequence", None])
def test_bypass_weights(
    level: str | None, threshold: Any, normalized: bool, losses: ModuleType, given: dict[str, Any]
) -> None:
    correction = {"rollout_is": level, "rollout_is_threshold": threshold, "rollout_is_batch_normalize": normalized}
    correction["loss_type"] = "reinforce"
    config = config_of(losses, policy={"loss_mode": "bypass_mode", "rollout_correction": correction})
    compare(losses, config, given)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["ppo_clip", "reinforce"])
@pytest.mark.parametrize("names", [*REJECTIONS, "token_k1,seq_max_k3"])
def test_bypass_rejections(names: str, kind: str, aggregation: str, losses: ModuleType, given: dict[str, Any]) -> None:
    threshold = REJECTIONS.get(names, "0.8_1.3,0.1")
    correction = {"rollout_rs": names, "rollout_rs_threshold": threshold, "loss_type": kind, "rollout_is": "token"}
    options = {"loss_agg_mode": aggregation, "entropy_coeff": 0.1, "use_kl_loss": True}
    config = config_of(losses, policy={"loss_mode": "bypass_mode", "rollout_correction": correction}, **options)
    loss = ours.loss(config)
    batch = uk.Batch(given["target"], given["advantage"], given["old"], given["ref"])
    stats = uk.token_stats(given["logits"], given["target"])
    kept = loss.terms[0].objective.objective.by.rejection(Tokens(batch, *stats))  # type: ignore[attr-defined]
    assert 0 < int(kept.sum()) < int(batch.valid.sum()), "rejects some"
    compare(losses, config, given)


def test_bypass_by_the_algorithm(losses: ModuleType, given: dict[str, Any]) -> None:
    correction = {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.03, "bypass_mode": True}
    config = config_of(losses, policy={"loss_mode": "bypass_mode", "rollout_correction": dict(correction)})
    assert ours.loss(config, config.policy_loss.rollout_correction) == ours.loss(config)


def test_a_mapping_is_read_as_the_configuration_is(losses: ModuleType) -> None:
    def plain(x: Any) -> Any:
        return {name: plain(x[name]) for name in x} if hasattr(x, "_mutable_fields") else x

    config = config_of(losses, use_kl_loss=True)
    assert ours.loss(plain(config)) == ours.loss(config)


def test_padded_length_is_of_padded_targets(losses: ModuleType, given: dict[str, Any]) -> None:
    loss = ours.loss(config_of(losses, policy={"loss_mode": "gpg"}, loss_agg_mode="seq-mean-token-sum-norm"))
    ends = torch.arange(B + 1, dtype=torch.int32) * L
    batch = uk.Batch(given["target"].reshape(-1), given["advantage"].reshape(-1), cu_seqlens=ends)
    with pytest.raises(ValueError, match="loss_scale_factor must be set for packed targets"):
        uk.fused_loss(given["logits"].reshape(-1, V), batch, loss)


@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode: str, losses: ModuleType, given: dict[str, Any]) -> None:
    old, ref = (-2 - torch.rand(B, L) for _ in range(2))
    target = torch.where(
        torch.arange(L) < torch.tensor([6, 3, 5, 1, 4]).unsqueeze(-1), torch.randint(V, (B, L)), uk.IGNORE
    )
    batch = uk.Batch(target, torch.randn(B), old, ref, fields={"random": torch.rand(B, L)})
    correction = {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.5, "loss_type": "reinforce"}
    policy = {"loss_mode": mode, "rollout_correction": correction, **COV}
    check_layouts(ours.loss(config_of(losses, policy=policy, entropy_coeff=0.1, use_kl_loss=True)), batch)
