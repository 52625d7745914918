"""The six data sources of the paradigm's table: samples, and the fields that the objective reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import unirl_kernels as uk
from examples.demo.sampling import Samples
from examples.demo.sequences import Sequences

KL_IN_REWARD = 0.04
GAE_LAMBDA = 0.95


class Degenerate(Exception):
    """The true gradient is smaller than rounding errors, so its error means nothing."""


@dataclass(frozen=True, eq=False)
class Source:
    """The data of one of the six algorithms.

    Args:
        algorithm: a key of ``oracle.LOSSES``.
        loss: its recipe.
        data: where the samples come from, in words.
        sequences: prompts and completions.
        batch: targets and the fields that the loss reads, in the layout of ``sequences.target``.
    """

    algorithm: str
    loss: uk.Loss
    data: str
    sequences: Sequences
    batch: uk.Batch


def gold_answers(gold: Sequences) -> Source:
    """SFT: q, o ~ P_sft."""
    return Source("sft", uk.sft(), "gold answers", gold, uk.Batch(gold.target))


def accepted_samples(frozen: Samples) -> Source:
    """RFT: o ~ pi_sft, the frozen model, accepted by the verifier; a rejected one has I(o) = 0."""
    batch = uk.Batch(frozen.sequences.target, frozen.verdicts)
    return Source("rft", uk.rft(), f"frozen model's samples, {_accepted(frozen)}", frozen.sequences, batch)


def accepted_samples_of_policy(policy: Samples) -> Source:
    """Online RFT: o ~ pi_theta, the policy as it stands, accepted by the verifier."""
    batch = uk.Batch(policy.sequences.target, policy.verdicts)
    return Source("online_rft", uk.online_rft(), f"policy's samples, {_accepted(policy)}", policy.sequences, batch)


def _accepted(samples: Samples) -> str:
    return f"{int(samples.verdicts.sum())}/{len(samples.verdicts)} accepted"


def best_worst_pairs(frozen: Samples, ref_logp: Tensor) -> Source:
    """DPO: o+, o- ~ pi_sft, of each question a best and a worst sample.

    Questions whose samples are all right or all wrong have no preference and give no pair; if that leaves none
    at all, their ties are taken, so that there is something to compute, and the description says so.

    Args:
        frozen: samples of the frozen model.
        ref_logp: [S, L] fp32, log-probabilities of those samples under the frozen model.

    Raises:
        Degenerate: when all pairs are of two equal samples.
    """
    rewards = frozen.verdicts.view(-1, frozen.group)
    best = rewards.argmax(-1)
    # From the other end, so that a tie is a pair of different samples.
    worst = frozen.group - 1 - rewards.flip(-1).argmin(-1)
    first = torch.arange(len(rewards), device=rewards.device) * frozen.group
    differ = rewards.amax(-1) > rewards.amin(-1)
    kept = differ if bool(differ.any()) else torch.ones_like(differ)
    chosen, rejected = (first + best)[kept], (first + worst)[kept]
    data = f"{len(chosen)} {'best/worst pairs' if bool(differ.any()) else 'ties (no preference)'} of frozen samples"
    if not bool((frozen.sequences.target[chosen] != frozen.sequences.target[rejected]).any()):
        raise Degenerate("DPO: best and worst sample of each question are equal")
    rows = torch.cat([chosen, rejected])
    sequences = frozen.sequences.select(rows)
    return Source("dpo", uk.dpo(), data, sequences, uk.Batch(sequences.target, ref_logp=ref_logp[rows]))


def samples_with_advantages(old: Samples, old_logp: Tensor, ref_logp: Tensor) -> Source:
    """PPO: o ~ pi_theta_old with an advantage for each token, by generalised advantage estimation.

    There is no critic: the value of every state is the mean verdict of the question's other samples.

    Args:
        old: samples of the old policy.
        old_logp, ref_logp: [S, L] fp32, log-probabilities under the old policy and the frozen model.
    """
    others = old.verdicts.view(-1, old.group)
    value = ((others.sum(-1, keepdim=True) - others) / (old.group - 1)).view(-1)
    target = old.sequences.target
    penalty = torch.where(target != uk.IGNORE, KL_IN_REWARD * (old_logp - ref_logp), 0.0)
    advantage = token_advantages(target != uk.IGNORE, old.verdicts, penalty, value)
    batch = uk.Batch(target, advantage, old_logp)
    return Source("ppo", uk.ppo(), "old policy's samples, advantages by GAE", old.sequences, batch)


def token_advantages(valid: Tensor, reward: Tensor, penalty: Tensor, value: Tensor) -> Tensor:
    """Generalised advantage estimation without discount, for a value that is the same in all states of a sequence.

        delta_t = r_t + V_{t+1} - V_t,  A_t = sum_k lambda^k delta_{t+k},  r_t = -penalty_t + [t last] reward

    Until the last token V_{t+1} = V_t; after it V = 0. The penalty per token is that of Shao et al. 2024
    (arXiv:2402.03300v3), eq. 2, beta log pi_old / pi_ref; the estimator that of Schulman et al. 2015
    (arXiv:1506.02438), eq. 16.

    Args:
        valid: [S, L] bool, the completions' tokens, the first of each at place 0.
        reward: [S] fp32, of the whole completion.
        penalty: [S, L] fp32, 0 outside the completions.
        value: [S] fp32, the expected reward.

    Returns:
        [S, L] fp32, 0 outside the completions.
    """
    delta = -penalty
    last = (valid.sum(-1) - 1).clamp(min=0)
    delta[torch.arange(len(last), device=last.device), last] += reward - value
    advantage = torch.zeros_like(delta)
    ahead = torch.zeros_like(reward)
    for place in range(delta.shape[1] - 1, -1, -1):
        ahead = torch.where(valid[:, place], delta[:, place] + GAE_LAMBDA * ahead, 0.0)
        advantage[:, place] = ahead
    return advantage


def groups(old: Samples, old_logp: Tensor, ref_logp: Tensor) -> Source:
    """GRPO: {o_i} ~ pi_theta_old, advantages relative to the group.

    Args:
        old: samples of the old policy.
        old_logp, ref_logp: [S, L] fp32, log-probabilities under the old policy and the frozen model.
    """
    advantage = uk.group_advantages(old.verdicts, old.group)
    batch = uk.Batch(old.sequences.target, advantage, old_logp, ref_logp)
    data = f"old policy's samples, {len(advantage) // old.group} groups of {old.group}"
    return Source("grpo", uk.grpo(), data, old.sequences, batch)
