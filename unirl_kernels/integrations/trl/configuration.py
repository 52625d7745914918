"""``integrations.trl.loss``: the loss of a configuration of TRL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unirl_kernels.integrations.options import Options
from unirl_kernels.integrations.trl import policy, preference
from unirl_kernels.integrations.versions import check_release
from unirl_kernels.objectives import Loss

TRIED = "1.16"
"""The release that these losses reproduce."""

CONFIGS: dict[str, Callable[..., Loss]] = {
    "GRPOConfig": policy.grpo,
    "RLOOConfig": policy.rloo,
    "DPOConfig": preference.dpo,
    "KTOConfig": preference.kto,
    "SFTConfig": preference.sft,
}


def loss(config: Any) -> Loss:
    """The loss of a configuration of TRL: what its trainer's ``compute_loss`` returns for a micro-batch.

    It takes a GRPOConfig, RLOOConfig, DPOConfig, KTOConfig or SFTConfig of TRL 1.16, or a subclass. Targets are the
    tokens that the trainer scores: prompts, padding and masked tool output are ``IGNORE``. Two options are not part of
    the loss: pass ``uk.Readout(temperature=config.temperature)``, and with ``cast_lm_head_to_fp32`` hidden states and
    weight in fp32.

    Besides ``target`` the batch needs:

    ===========================  ==========================  =====================================================
    configuration                where                       what, by TRL's name
    ===========================  ==========================  =====================================================
    GRPOConfig, RLOOConfig       ``advantage`` [S]           ``advantages``
    the same                     ``old_logp``                ``old_per_token_logps``; None where TRL has None
    GRPO, ``beta`` not 0         ``ref_logp``                ``ref_per_token_logps``
    GRPO, ``use_vllm`` and the   ``rollout_logp``            ``sampling_per_token_logps``, NaN where vLLM gave
    correction, or the off-                                  none
    policy mask
    GRPO: dapo, cispo, vespo     ``num_items_in_batch`` []   the same, of the generation batch
    GRPO, adaptive entropy       ``entropy_coef`` []         the coefficient in force, 0 above the target
    DPOConfig                    ``ref_logp``                the reference's ``log_probs``. The first half of the
                                                             sequences is chosen
    DPO, KTO, precomputed        ``ref_logps`` [S]           ``ref_chosen_logps`` and ``ref_rejected_logps``;
                                                             ``ref_logps``
    DPO, ``use_weighting``       ``log_sum_sq_probs``        the same (``uk.token_observations`` of the policy)
    KTOConfig                    ``label`` [S]               the same
    the same                     ``ref_logp``                the reference's ``log_probs``
    KTO, ``kto``                 ``kl`` []                   the mean of ``KL_logps`` - ``ref_KL_logps`` over all
                                                             processes
    SFTConfig                    ``num_items_in_batch`` []   the same
    ===========================  ==========================  =====================================================

    GRPO's loss has the factor 1 / gradient_accumulation_steps, as in its trainer. For a window of n micro-batches
    multiply it by gradient_accumulation_steps / n. In evaluation multiply it by gradient_accumulation_steps, and
    num_items_in_batch by steps_per_generation. For SFT in evaluation num_items_in_batch is the number of tokens in the
    batch; with ``average_tokens_across_devices`` multiply it by the number of processes.

    ``out.metrics`` has TRL's names and values, of this process: ``clip_ratio/...``, ``cispo_clip_ratio``, ``kl``,
    ``entropy``, ``vespo/phi_seq_mean``, ``rewards/...``, ``logps/...``. ``out.terms`` has the terms, the entropy bonus
    last. Missing are counts, and ``logits/...`` and ``mean_token_accuracy``, for which there is
    ``uk.token_observations``.

    Differences from TRL: with an advantage per token, sequence-level metrics use its mean; ratios are bounded by e^40;
    a sequence without tokens adds 0, while TRL's RLOO and KTO add a constant without a gradient. DPO's ``ipo`` and
    ``sigmoid_norm`` divide by the scored tokens; TRL counts one more if a completion starts the sequence.

    Args:
        config: the configuration, as its trainer takes it.

    Returns:
        The loss.

    Raises:
        ImportError: when TRL is not installed. Another release gives a warning, see ``integrations.versions``.
        TypeError: when the configuration has another class, lacks an option, or an option has another type.
        ValueError: when an option has an unknown value, is outside its range, or cannot be expressed as a loss: label
            smoothing of SFT, a router's loss, an entropy quantile over several processes.
    """
    return with_options(config)[0]


def with_options(config: Any, **fields: str) -> tuple[Loss, dict[str, Any]]:
    """``loss(config)``, and the options that determine it, with their values.

    Args:
        config: the configuration.
        fields: names of fields with what the trainer has computed; see ``policy.grpo``.
    """
    check_release("trl", TRIED, TRIED)
    names = [f"{c.__module__}.{c.__name__}" for c in type(config).__mro__ if c.__module__.partition(".")[0] == "trl"]
    name = names[0].rpartition(".")[2] if names else ""
    if not names or names[0].split(".")[1] != "trainer" or name not in CONFIGS:
        got = names[0] if names else type(config).__name__
        raise TypeError(f"config must be one of {', '.join(CONFIGS)} of TRL, got {got}; build its loss from objectives")
    options = Options(config, name)
    return CONFIGS[name](options, **fields), options.read
