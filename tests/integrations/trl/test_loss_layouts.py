"""``trl.loss`` padded and packed, of logits and of a linear head, in one chunk and in several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

import trl

import unirl_kernels as uk
from tests.integrations.trainers import V, check_layouts
from tests.integrations.trl.test_loss_policy import KINDS, MODES, PLAIN
from tests.integrations.trl.test_loss_preference import DPO_TYPES
from unirl_kernels.integrations import trl as ours

LENGTHS = torch.tensor([7, 3, 5, 1, 7, 4])
GRPO = [
    *(
        {"loss_type": kind, "importance_sampling_level": x, "beta": 0.1}
        for kind in KINDS
        for x in ("token", "sequence")
    ),
    *({"vllm_importance_sampling_mode": mode, "off_policy_mask_threshold": 0.1} for mode in MODES),
    {"vllm_importance_sampling_mode": "token_mask", "loss_type": "vespo"},
    {"top_entropy_quantile": 0.5, "use_adaptive_entropy": True},
    {"use_adaptive_entropy": True},
]
CASES: list[tuple[Any, dict[str, Any]]] = [
    *((trl.GRPOConfig, {"num_generations": 2, "use_vllm": "vllm_importance_sampling_mode" in x, **x}) for x in GRPO),
    (trl.RLOOConfig, {}),
    *((trl.DPOConfig, {"loss_type": kind, "label_smoothing": 0.1, "ld_alpha": 0.5}) for kind in DPO_TYPES),
    (trl.DPOConfig, {"use_weighting": True, "precompute_ref_log_probs": True}),
    *((trl.KTOConfig, {"loss_type": kind}) for kind in ("kto", "apo_zero_unpaired")),
    *((trl.SFTConfig, {"loss_type": kind}) for kind in ("nll", "dft")),
]


@pytest.fixture
def batch() -> uk.Batch:
    n = len(LENGTHS)
    target = torch.where(torch.arange(7) < LENGTHS.unsqueeze(-1), torch.randint(V, (n, 7)), uk.IGNORE)
    of_tokens = {name: -2 - torch.rand(n, 7) for name in ("rollout_logp", "log_sum_sq_probs")}
    of_sequences = {"ref_logps": -10 * torch.rand(n), "label": torch.tensor([1, 0, 0, 1, 1, 0])}
    of_all = {"num_items_in_batch": torch.tensor(20), "entropy_coef": torch.tensor(0.1), "kl": torch.tensor(0.2)}
    old, ref = (-2 - torch.rand(n, 7) for _ in range(2))
    return uk.Batch(target, torch.randn(n), old, ref, fields=of_tokens | of_sequences | of_all)


@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=[f"{k.__name__}-{'-'.join(map(str, x.values()))}" for k, x in CASES]
)
def test_layouts(kind: Any, options: dict[str, Any], batch: uk.Batch) -> None:
    check_layouts(ours.loss(kind(**options, **PLAIN)), batch)
