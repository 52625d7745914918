"""Rows 170 to 198: distillation from sampled tokens, aggregations."""

from __future__ import annotations

import torch

import unirl_kernels as uk
from tests.objectives.variants.data import Answer
from tests.objectives.variants.of_policy import clip
from tests.objectives.variants.of_sums import low_variance
from tests.objectives.variants.rows import (
    Row,
    mean_of_means,
    mean_of_sums,
    of_groups,
    ppo,
    r,
    sg,
    sum_of_means,
    token_mean,
    token_sum,
)
from unirl_kernels.objectives import (
    OPD,
    Clip,
    LowVarianceKL,
    Reinforce,
    SampledReverseKL,
    TeacherAdvantage,
    WithAdvantage,
)

TOKENS = uk.TokenMean()
A = "advantage old_logp"
PPO = Clip()


def full(answers: list[Answer]) -> int:
    return sum(len(o) > 0 for o in answers)


def micro_batches(answers: list[Answer]) -> object:
    """Two micro-batches: the mean of their token means."""
    return sum(token_mean(clip)(part) for part in (answers[:3], answers[3:])) / 2


class MeanOfMicroBatches:
    """As a user writes it: every token of a micro-batch weighs 1 / (micro-batches, its tokens)."""

    def weights(self, batch: uk.Batch) -> torch.Tensor:
        tokens = batch.lengths.view(2, -1).sum(-1, keepdim=True).expand(2, 3).reshape(-1)
        return batch.per_token(1 / (2 * tokens.double()))


ROWS = [
    Row(
        170,
        "opd as policy gradient",
        lambda: uk.Loss(WithAdvantage(Clip(), TeacherAdvantage()), TOKENS),
        token_mean(lambda o: ppo(r(o), o.teacher_logp - o.old_logp)),
        "old_logp teacher_logp",
    ),
    Row(
        171,
        "opd from the current policy",
        lambda: uk.Loss(OPD(), TOKENS),
        token_mean(lambda o: -r(o) * sg(o.teacher_logp - o.logp)),
        "old_logp teacher_logp",
    ),
    Row(
        172,
        "sampled-token reverse KL",
        lambda: uk.Loss(SampledReverseKL()),
        mean_of_means(lambda o: sg(o.logp - o.teacher_logp) * o.logp),
        "teacher_logp",
    ),
    Row(
        173,
        "k3 to the teacher, bounded",
        lambda: uk.Loss(LowVarianceKL("teacher_logp"), TOKENS),
        token_mean(lambda o: low_variance(o, "teacher_logp")),
        "teacher_logp",
    ),
    Row(
        174,
        "iw-opd from stored rollouts",
        lambda: uk.Loss(Reinforce(), TOKENS),
        token_mean(lambda o: -o.advantage * o.logp),
        "advantage:token_advantage",
    ),
    Row(185, "mean of means", lambda: uk.Loss(PPO), mean_of_means(clip), A),
    Row(
        186,
        "mean of means, empty ones do not count",
        lambda: uk.Loss(PPO, uk.SequenceMean(empty="skip")),
        lambda answers: sum_of_means(clip)(answers) / full(answers),
        A,
    ),
    Row(
        187,
        "mean of means over the global batch",
        lambda: uk.Loss(PPO, uk.SequenceMean(16)),
        lambda answers: sum_of_means(clip)(answers) / 16,
        A,
    ),
    Row(188, "token mean, local", lambda: uk.Loss(PPO, TOKENS), token_mean(clip), A),
    Row(
        189,
        "token mean, global",
        lambda: uk.Loss(PPO, uk.TokenMean(torch.tensor(50.0))),
        lambda answers: token_sum(clip)(answers) / 50,
        A,
    ),
    Row(190, "token sum", lambda: uk.Loss(PPO, uk.TokenMean(1)), token_sum(clip), A),
    Row(191, "dr. grpo, constant length", lambda: uk.Loss(PPO, uk.FixedLength(32)), mean_of_sums(clip, 32), A),
    Row(
        192,
        "seq-mean-token-sum-norm",
        lambda: uk.Loss(PPO, uk.FixedLength(32, empty="skip")),
        lambda answers: token_sum(clip)(answers) / (32 * full(answers)),
        A,
    ),
    Row(193, "seq-mean-token-sum", lambda: uk.Loss(PPO, uk.FixedLength(1)), mean_of_sums(clip), A),
    Row(
        194,
        "prompt mean",
        lambda: uk.Loss(PPO, uk.GroupMean()),
        of_groups(lambda group: token_mean(clip)(group)),
        A + " group",
    ),
    Row(195, "mean of micro-batch token means", lambda: uk.Loss(PPO, MeanOfMicroBatches()), micro_batches, A),
    Row(
        196,
        "rejected tokens stay in the denominator",
        lambda: uk.Loss(PPO, uk.Weighted(uk.SequenceMean(), "keep")),
        mean_of_means(lambda o: clip(o) * o.keep),
        A + " keep",
    ),
    Row(
        197,
        "sample weights",
        lambda: uk.Loss(PPO, uk.Weighted(TOKENS, "sample_weight")),
        token_mean(lambda o: o.sample_weight * clip(o)),
        A + " sample_weight",
    ),
]
