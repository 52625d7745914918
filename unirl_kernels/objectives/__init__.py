"""Objectives: what each token contributes to a loss. They import torch, the batch and the tracer, nothing else."""

from unirl_kernels.objectives.aggregate import (
    Aggregation,
    FixedLength,
    GroupMean,
    PairMean,
    SequenceMean,
    TokenMean,
    Weighted,
)
from unirl_kernels.objectives.likelihood import RFT, SFT, OnlineRFT
from unirl_kernels.objectives.loss import Loss, Objective, Paradigm, Term
from unirl_kernels.objectives.policy import KL, Clip, PolicyGradient, Ratio
from unirl_kernels.objectives.preference import DPO
from unirl_kernels.objectives.tokens import Tokens

__all__ = [
    "DPO",
    "KL",
    "RFT",
    "SFT",
    "Aggregation",
    "Clip",
    "FixedLength",
    "GroupMean",
    "Loss",
    "Objective",
    "OnlineRFT",
    "PairMean",
    "Paradigm",
    "PolicyGradient",
    "Ratio",
    "SequenceMean",
    "Term",
    "TokenMean",
    "Tokens",
    "Weighted",
]
