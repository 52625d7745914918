"""Validate arguments, choose backend and kernel, compose the operators. No mathematics."""

from unirl_kernels.api.linear import fused_linear_loss, linear_token_observations, linear_token_stats
from unirl_kernels.api.logits import fused_loss, token_observations, token_stats
from unirl_kernels.api.logprobs import linear_logprobs, logprobs
from unirl_kernels.api.outputs import LossOutput, MetricParts, TokenObservations, TokenStats

__all__ = [
    "LossOutput",
    "MetricParts",
    "TokenObservations",
    "TokenStats",
    "fused_linear_loss",
    "fused_loss",
    "linear_logprobs",
    "linear_token_observations",
    "linear_token_stats",
    "logprobs",
    "token_observations",
    "token_stats",
]
