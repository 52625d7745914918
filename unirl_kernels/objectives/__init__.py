"""Objectives: what each token contributes to a loss. They import torch, the batch and the tracer, nothing else.

One family a file: likelihood, policy, surrogates, importance, penalties, distillation; sequence, regression, group,
batch; preference, pairs, unpaired. What they are made of: compose, corrections, trust, advantages, scores.
"""

from unirl_kernels.objectives import (
    advantages,
    batch,
    compose,
    corrections,
    distillation,
    group,
    importance,
    likelihood,
    pairs,
    penalties,
    policy,
    preference,
    regression,
    scores,
    sequence,
    surrogates,
    trust,
    unpaired,
)
from unirl_kernels.objectives.advantages import *
from unirl_kernels.objectives.aggregate import (
    Aggregation,
    FixedLength,
    GroupMean,
    PairMean,
    SequenceMean,
    TokenMean,
    Weighted,
)
from unirl_kernels.objectives.batch import *
from unirl_kernels.objectives.compose import *
from unirl_kernels.objectives.corrections import *
from unirl_kernels.objectives.distillation import *
from unirl_kernels.objectives.group import *
from unirl_kernels.objectives.importance import *
from unirl_kernels.objectives.likelihood import *
from unirl_kernels.objectives.loss import Loss, Objective, Paradigm
from unirl_kernels.objectives.pairs import *
from unirl_kernels.objectives.penalties import *
from unirl_kernels.objectives.policy import *
from unirl_kernels.objectives.preference import *
from unirl_kernels.objectives.regression import *
from unirl_kernels.objectives.scores import *
from unirl_kernels.objectives.sequence import *
from unirl_kernels.objectives.surrogates import *
from unirl_kernels.objectives.term import Term
from unirl_kernels.objectives.tokens import Tokens
from unirl_kernels.objectives.trust import *
from unirl_kernels.objectives.unpaired import *

__all__ = [
    "Aggregation",
    "FixedLength",
    "GroupMean",
    "Loss",
    "Objective",
    "PairMean",
    "Paradigm",
    "SequenceMean",
    "Term",
    "TokenMean",
    "Tokens",
    "Weighted",
]
__all__ += advantages.__all__
__all__ += batch.__all__
__all__ += compose.__all__
__all__ += corrections.__all__
__all__ += distillation.__all__
__all__ += group.__all__
__all__ += importance.__all__
__all__ += likelihood.__all__
__all__ += pairs.__all__
__all__ += penalties.__all__
__all__ += policy.__all__
__all__ += preference.__all__
__all__ += regression.__all__
__all__ += scores.__all__
__all__ += sequence.__all__
__all__ += surrogates.__all__
__all__ += trust.__all__
__all__ += unpaired.__all__
