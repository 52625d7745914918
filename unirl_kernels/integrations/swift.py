"""ms-swift's log-probabilities on this package's kernels.

For ms-swift 4. Its trainers for GRPO, DPO, KTO and similar losses score tokens with TRL's ``selective_log_softmax``.
For entropies they use TRL's ``entropy_from_logits``, or their own function of that name. ``patch()`` replaces these in
ms-swift's modules, for any release of TRL. TRL's own modules are left to ``integrations.trl``. Megatron's functions for
a split vocabulary are not replaced.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from unirl_kernels.api import logprobs
from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known
from unirl_kernels.integrations.rows import entropy
from unirl_kernels.integrations.versions import check_release

TRIED = "4"

_switch = Switch()


def patch() -> Patch:
    """Let ms-swift compute log-probabilities, entropies and their gradients with this package, until ``unpatch()``.

    Call it before a trainer is created, for instance in a file that ``--external_plugins`` names. Patching again
    changes nothing. In a ``with`` statement the patch ends with the block.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when ms-swift is not installed, or what it needs is not.
        RuntimeError: when it does not have what was looked for. A release that was not tried warns.
    """
    check_release("ms-swift", TRIED, TRIED)
    _switch.off()
    mixin = importlib.import_module("swift.rlhf_trainers.rlhf_mixin")
    trainer = importlib.import_module("swift.rlhf_trainers.grpo_trainer")
    scored, _ = known(mixin, "selective_log_softmax", ("logits", "index"))
    entropies, _ = known(trainer, "entropy_from_logits", ("logits", "chunk_size"))
    return _switch.on(
        [Replacement(scored, selective_log_softmax, "swift"), Replacement(entropies, entropy_from_logits, "swift")]
    )


def unpatch() -> None:
    """Restore the functions that ms-swift had before. Without a patch it does nothing."""
    _switch.off()


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """log pi of each index.

    Args:
        logits: [..., V].
        index: [...] int64.

    Returns:
        [...] float32, also for 16-bit logits. It may be changed in place.
    """
    return logprobs(logits, index)


def entropy_from_logits(logits: Tensor, chunk_size: int = 1) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V].

    Args:
        logits: [..., V].
        chunk_size: of TRL's chunks, which keep its copies of the logits small; here there are none.
    """
    return entropy(logits)
