"""LLaMA-Factory's losses on this package's kernels: SFT, and DPO, KTO and their relatives.

Tried with LLaMA-Factory 0.9. SFT's loss is that of the model, which transformers keeps in a table; the preference
trainers sum log-probabilities by ``get_batch_logps``. ``patch()`` replaces both. The losses ``use_dft_loss``,
``use_eaft_loss`` and ``use_asft_loss`` stay LLaMA-Factory's own.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from unirl_kernels.api import token_stats
from unirl_kernels.batch import IGNORE, shift_targets
from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known
from unirl_kernels.integrations.transformers import LOSS_PARAMETERS, causal_lm_loss
from unirl_kernels.integrations.versions import check_release

TRIED = "0.9"

_switch = Switch()


def patch() -> Patch:
    """Let LLaMA-Factory compute its losses and their gradients with this package, until ``unpatch()``.

    Call it before ``run_exp``. Every causal language model of transformers that has not overridden its loss gets
    ``causal_lm_loss``, not only those that LLaMA-Factory trains. Patching again changes nothing. In a ``with``
    statement the patch ends with the block.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when LLaMA-Factory is not installed, or what it needs is not.
        RuntimeError: when it does not have what was looked for. A release that was not tried warns.
    """
    check_release("llamafactory", TRIED, TRIED)
    _switch.off()
    utils = importlib.import_module("llamafactory.train.trainer_utils")
    losses = importlib.import_module("transformers.loss.loss_utils")
    summed, _ = known(utils, "get_batch_logps", ("logits", "labels", "label_pad_token_id", "ld_alpha"))
    loss, _ = known(losses, "ForCausalLMLoss", LOSS_PARAMETERS)
    return _switch.on(
        [
            Replacement(summed, get_batch_logps, "llamafactory"),
            Replacement(loss, causal_lm_loss, "transformers.loss.loss_utils"),
        ]
    )


def unpatch() -> None:
    """Restore LLaMA-Factory's and transformers' own functions. Without a patch it does nothing."""
    _switch.off()


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = IGNORE, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """log pi of each sequence, the sum over its labels; and how many labels it has.

    Args:
        logits: [B, L, V].
        labels: [B, L] int64, the tokens themselves: the logits at t are scored against label t + 1.
        label_pad_token_id: label of a token that does not count.
        ld_alpha: weight of what a sequence has beyond the length of its pair's other one (LD-DPO, arXiv:2409.06411).
            The first half of the sequences is chosen, the second are their rejected. None for no such weight.

    Returns:
        [B] float32 and [B] int64.

    Raises:
        ValueError: when logits and labels do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    target = shift_targets(torch.where(labels == label_pad_token_id, IGNORE, labels))
    logp, valid = token_stats(logits, target).logp, target != IGNORE
    lengths = valid.sum(-1)
    if ld_alpha is None:
        return logp.sum(-1), lengths
    public = torch.minimum(*lengths.chunk(2)).repeat(2)
    # From the first label on, including ignored positions in between.
    position = torch.arange(labels.shape[1], device=labels.device) - valid.int().argmax(-1, keepdim=True)
    return torch.where(position < public.unsqueeze(-1), logp, ld_alpha * logp).sum(-1), lengths
