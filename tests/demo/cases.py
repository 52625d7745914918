"""Cases for the tests of the demo."""

from __future__ import annotations

import torch

import unirl_kernels as uk
from examples.demo.model import LanguageModel
from examples.demo.sampling import Sampler, Samples
from examples.demo.sources import (
    Source,
    accepted_samples,
    accepted_samples_of_policy,
    best_worst_pairs,
    gold_answers,
    groups,
    samples_with_advantages,
)

CPU = torch.device("cpu")
PLAN = uk.Plan("eager")
VOCAB = 257


def six_sources(model: LanguageModel, sampler: Sampler, samples: Samples) -> list[Source]:
    """The six sources, for a policy that has changed since it drew the samples, and more since the frozen model."""
    logp = model.log_probs(samples.sequences, PLAN)
    old, ref = (
        torch.where(samples.sequences.target != uk.IGNORE, logp + size * torch.randn(logp.shape), 0.0)
        for size in (0.2, 0.3)
    )
    gold = sampler.gold(model, sampler.questions.draw(3))
    return [
        gold_answers(gold),
        accepted_samples(samples),
        accepted_samples_of_policy(samples),
        best_worst_pairs(samples, ref),
        samples_with_advantages(samples, old, ref),
        groups(samples, old, ref),
    ]
