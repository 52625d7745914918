"""Fused kernels for the loss head of LLM post-training: SFT, RFT, Online RFT, DPO, PPO, GRPO and your own objective."""

from unirl_kernels._version import __version__
from unirl_kernels.api import (
    LossOutput,
    MetricParts,
    TokenObservations,
    TokenStats,
    fused_linear_loss,
    fused_loss,
    linear_logprobs,
    linear_token_observations,
    linear_token_stats,
    logprobs,
    token_observations,
    token_stats,
)
from unirl_kernels.batch import IGNORE, Batch, shift_targets
from unirl_kernels.counts import global_batch, global_count
from unirl_kernels.explain import explain
from unirl_kernels.integrations.heads import HeadParameters, head_parameters
from unirl_kernels.objectives import FixedLength, GroupMean, Loss, PairMean, SequenceMean, TokenMean, Weighted
from unirl_kernels.objectives.advantages import group_advantages
from unirl_kernels.objectives.recipes import dpo, grpo, online_rft, ppo, rft, sft
from unirl_kernels.plan import Plan
from unirl_kernels.program import UnsupportedOperation
from unirl_kernels.ranks.shard import VocabShard
from unirl_kernels.readout import Readout

__all__ = [
    "IGNORE",
    "Batch",
    "FixedLength",
    "GroupMean",
    "HeadParameters",
    "Loss",
    "LossOutput",
    "MetricParts",
    "PairMean",
    "Plan",
    "Readout",
    "SequenceMean",
    "TokenMean",
    "TokenObservations",
    "TokenStats",
    "UnsupportedOperation",
    "VocabShard",
    "Weighted",
    "__version__",
    "dpo",
    "explain",
    "fused_linear_loss",
    "fused_loss",
    "global_batch",
    "global_count",
    "group_advantages",
    "grpo",
    "head_parameters",
    "linear_logprobs",
    "linear_token_observations",
    "linear_token_stats",
    "logprobs",
    "online_rft",
    "ppo",
    "rft",
    "sft",
    "shift_targets",
    "token_observations",
    "token_stats",
]
