"""``trl.loss`` of DPOConfig, KTOConfig and SFTConfig: TRL's own losses, gradients and logs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl

import unirl_kernels as uk
from tests.integrations.trainers import Scored, V, check
from tests.integrations.trl.test_loss_policy import PLAIN, Accelerator
from unirl_kernels.integrations import trl as ours

B, L = 6, 5
LENGTHS = torch.tensor([5, 2, 4, 3, 5, 1])
LOGGED = ("rewards/", "logps/", "entropy", "kl")
DPO_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
OF_DIVERGENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


class Head(torch.nn.Module):
    """A model whose head gives tokens."""

    is_gradient_checkpointing = False

    def __init__(self, tokens: Any, log_sum_sq_probs: Tensor | None = None) -> None:
        super().__init__()
        shape = tokens.logp.shape
        self.outputs = SimpleNamespace(
            log_probs=tokens.logp,
            entropy=tokens.entropy,
            label_mask=tokens.mask,
            mean_logits=torch.zeros(shape),
            is_top1=torch.zeros(shape, dtype=torch.bool),
            log_sum_sq_probs=log_sum_sq_probs,
        )

    def forward(self, **kwargs: Any) -> Any:
        return self.outputs


@pytest.fixture
def given() -> dict[str, Any]:
    target = torch.where(torch.arange(L) < LENGTHS.unsqueeze(-1), torch.randint(V, (B, L)), uk.IGNORE)
    logits = 2 * torch.randn(B, L, V, dtype=torch.float64)
    logp = torch.log_softmax(logits, -1)
    ref = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) + 0.5 * torch.randn(B, L)
    return {
        "logits": logits,
        "target": target,
        "ref": torch.where(target == uk.IGNORE, 0, ref),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "label": torch.tensor([True, False, False, True, True, False]),
        "kl": torch.tensor(0.3, dtype=torch.float64),
        "num_items_in_batch": torch.tensor(31),
    }


def trainer_of(kind: Any, config: Any, head: Head, ref: Tensor | None = None) -> Any:
    trainer = object.__new__(kind)
    vars(trainer).update({name: getattr(config, name) for name in vars(config) if not hasattr(kind, name)})
    reference = None if ref is None else Head(Scored(ref, ref, ref))
    vars(trainer).update(
        args=config,
        accelerator=Accelerator(),
        model=head,
        ref_model=reference,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return trainer


def inputs_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """Prompts of one token; what is scored is shifted."""
    padded = torch.nn.functional.pad(given["target"], (1, 0), value=uk.IGNORE)
    mask = (padded != uk.IGNORE).long()
    return {"input_ids": padded.clamp(min=0), "attention_mask": mask, "completion_mask": mask}


def logged(trainer: Any) -> dict[str, float]:
    return {name: x[0] for name, x in trainer._metrics["train"].items() if name.startswith(LOGGED)}


def dpo(config: Any) -> Any:
    def run(tokens: Scored, given: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        trainer = trainer_of(trl.DPOTrainer, config, Head(tokens, given["log_sum_sq_probs"]), given["ref"])
        trainer.precompute_ref_logps = config.precompute_ref_log_probs
        trainer.loss_types = config.loss_type
        trainer.loss_weights = config.loss_weights or [1.0] * len(config.loss_type)
        inputs = inputs_of(given)
        if config.precompute_ref_log_probs:
            parts = trainer.compute_ref_log_probs(trainer.ref_model, dict(inputs))
            inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), parts, strict=True))
        return trainer._compute_loss(trainer.model, inputs, False), logged(trainer)

    return run


def precomputed(config: Any, given: dict[str, Any]) -> Tensor:
    trainer = trainer_of(trl.DPOTrainer, config, Head(Scored(given["ref"], given["ref"], given["ref"])))
    return torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs_of(given)))


def compare(config: Any, given: dict[str, Any], theirs: Any, exact: torch.dtype = torch.float64) -> None:
    def batch_of(x: dict[str, Any]) -> uk.Batch:
        names = ("log_sum_sq_probs", "label", "kl", "num_items_in_batch", "ref_logps")
        fields = {name: x[name] for name in names if name in x}
        whole = getattr(config, "precompute_ref_log_probs", False)
        return uk.Batch(x["target"], ref_logp=None if whole else x["ref"], fields=fields)

    def same(out: uk.LossOutput) -> dict[str, Tensor]:
        found = {name: x for name, x in out.metrics.items() if name.startswith(LOGGED)}
        # Without a field ``kl`` it is the package's own estimate, which TRL's DPO and SFT do not have.
        return found if isinstance(config, trl.KTOConfig) else {k: x for k, x in found.items() if k != "kl"}

    reads = {name: x for name, x in given.items() if name != "logits"}
    check(ours.loss(config), theirs, given["logits"], given["target"], reads, batch_of, same, exact)


@pytest.mark.parametrize("kind", DPO_TYPES)
def test_dpo_loss_types(kind: str, given: dict[str, Any]) -> None:
    config = trl.DPOConfig(loss_type=kind, beta=0.3, label_smoothing=0.1, **PLAIN)
    compare(config, given, dpo(config))


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("kind", OF_DIVERGENCES)
def test_dpo_divergences(kind: str, divergence: str, alpha: float | None, given: dict[str, Any]) -> None:
    options = {"f_divergence_type": divergence, "ld_alpha": alpha, "label_smoothing": 0.2}
    config = trl.DPOConfig(loss_type=kind, **options, **PLAIN)
    # TRL has no alpha divergence in float64.
    exact = torch.float32 if divergence == "alpha_divergence" else torch.float64
    compare(config, given, dpo(config), exact)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", DPO_TYPES)
def test_dpo_shortened_by_the_other(kind: str, precompute: bool, given: dict[str, Any]) -> None:
    options = {"ld_alpha": 0.4, "label_smoothing": 0.1, "precompute_ref_log_probs": precompute}
    config = trl.DPOConfig(loss_type=kind, **options, **PLAIN)
    given["ref_logps"] = precomputed(config, given)
    compare(config, given, dpo(config))


@pytest.mark.parametrize("kind", [kind for kind in DPO_TYPES if kind not in ("aot", "aot_unpaired", "sft")])
def test_dpo_weighted(kind: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = trl.DPOConfig(loss_type=kind, use_weighting=True, label_smoothing=0.1, **PLAIN)
    # TRL multiplies in place, which the gradient of relu does not survive.
    monkeypatch.setattr(torch, "relu", lambda x: x.relu().clone())
    compare(config, given, dpo(config))


def test_dpo_alpha_of_one_is_the_reverse_kl(given: dict[str, Any]) -> None:
    config = trl.DPOConfig(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0, **PLAIN)
    compare(config, given, dpo(config))


@pytest.mark.parametrize("weights", [None, [0.8, 0.2, 1.0]])
def test_dpo_types_add_up(weights: list[float] | None, given: dict[str, Any]) -> None:
    config = trl.DPOConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=weights, **PLAIN)
    assert len(ours.loss(config).terms) == 3
    compare(config, given, dpo(config))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss_type": ["sigmoid", "best"]}, "DPOConfig.loss_type must be one of 'sigmoid', .*, got 'best'"),
        ({"loss_type": []}, r"loss_type must be a list of loss types, got \[\]"),
        ({"loss_weights": [1.0, 2.0]}, r"loss_weights must have one weight for each of \['sigmoid'\]"),
        ({"loss_weights": ["much"]}, "loss_weights must be a number, got 'much'"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"f_divergence_type": "hellinger"}, "f_divergence_type must be one of 'reverse_kl', .*, got 'hellinger'"),
        ({"f_divergence_type": "forward_kl", "loss_type": ["aot"]}, "f_divergence_type='forward_kl' cannot be part"),
        ({"use_weighting": True, "loss_type": ["aot"]}, "use_weighting=True cannot be part of the loss: .*; set False"),
        ({"use_weighting": True, "loss_type": ["sft"]}, "use_weighting=True cannot be part of the loss: .*; set False"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing must be positive with exo_pair, got 0.0"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        ({"ld_alpha": 2.0}, r"ld_alpha must lie in \[0, 1\], got 2.0"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 cannot be part of the loss"),
    ],
)
def test_dpo_refuses_by_name(options: dict[str, Any], error: str) -> None:
    config = trl.DPOConfig(**PLAIN)
    vars(config).update(options)
    with pytest.raises((TypeError, ValueError), match=error):
        ours.loss(config)


def kto(config: Any) -> Any:
    def run(tokens: Scored, given: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        trainer = trainer_of(trl.KTOTrainer, config, Head(tokens), given["ref"])
        trainer.precompute_ref_logps = config.precompute_ref_log_probs
        trainer.calculate_KL = config.loss_type == "kto"
        # What TRL estimates the divergence from: log-probabilities of other completions.
        trainer._compute_kl_logps = lambda model, batch: given["kl"].expand(2) if model is trainer.model else 0.0
        inputs = {**inputs_of(given), "label": given["label"], "ref_logps": given["ref"].sum(-1), "ref_KL_logps": 0.0}
        return trainer._compute_loss(trainer.model, inputs, False), logged(trainer)

    return run


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kl", [0.3, -0.2])
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(kind: str, kl: float, precompute: bool, given: dict[str, Any]) -> None:
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.7, "precompute_ref_log_probs": precompute}
    config = trl.KTOConfig(loss_type=kind, beta=0.4, **options, **PLAIN)
    given["kl"] = torch.tensor(kl, dtype=torch.float64)
    given["ref_logps"] = given["ref"].sum(-1)
    compare(config, given, kto(config))


def test_kto_refuses_by_name() -> None:
    config = trl.KTOConfig(**PLAIN)
    config.loss_type = "bco"
    with pytest.raises(ValueError, match=r"KTOConfig.loss_type must be one of 'kto', 'apo_zero_unpaired', got 'bco'"):
        ours.loss(config)


def sft(config: Any) -> Any:
    def run(tokens: Scored, given: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        trainer = trainer_of(trl.SFTTrainer, config, Head(tokens))
        trainer.compute_loss_func, trainer.label_smoother = None, None
        trainer.get_tp_size = lambda: 1
        inputs = {"attention_mask": inputs_of(given)["attention_mask"]}
        return trainer.compute_loss(trainer.model, inputs, False, given["num_items_in_batch"]), logged(trainer)

    return run


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("kind", ["nll", "dft", "chunked_nll"])
def test_sft(kind: str, averaged: bool, processes: int, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = trl.SFTConfig(loss_type=kind, average_tokens_across_devices=averaged, **PLAIN)
    config.average_tokens_across_devices = averaged
    monkeypatch.setattr(trl.SFTConfig, "world_size", processes)
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    compare(config, given, sft(config))


def test_sft_refuses_label_smoothing_where_trl_applies_it() -> None:
    smooth = {"label_smoothing_factor": 0.1, **PLAIN}
    with pytest.raises(
        ValueError, match=r"SFTConfig.label_smoothing_factor=0.1 cannot be part of the loss: .*; set 0.0"
    ):
        ours.loss(trl.SFTConfig(**smooth))
    assert ours.loss(trl.SFTConfig(loss_type="dft", **smooth)) == ours.loss(trl.SFTConfig(loss_type="dft", **PLAIN))
    config = trl.SFTConfig(**PLAIN)
    config.loss_type = "hinge"
    with pytest.raises(ValueError, match=r"SFTConfig.loss_type must be one of 'nll', .*, got 'hinge'"):
        ours.loss(config)
