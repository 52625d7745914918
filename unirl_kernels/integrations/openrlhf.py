"""OpenRLHF's log-probabilities and entropies on this package's kernels.

Tried with OpenRLHF 0.11. Its actor scores tokens by two functions of logits, which ``patch()`` replaces in every module
that has imported them. Its losses stay its own.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from unirl_kernels.api import logprobs
from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known
from unirl_kernels.integrations.rows import entropy
from unirl_kernels.integrations.versions import check_release
from unirl_kernels.readout import Readout

TRIED = "0.11"

_switch = Switch()


def patch() -> Patch:
    """Let OpenRLHF compute log-probabilities, entropies and their gradients with this package, until ``unpatch()``.

    Call it in every worker process, before training. Patching again changes nothing. In a ``with`` statement the patch
    ends with the block.

    Returns:
        ``Patch``.

    Raises:
        ImportError: when OpenRLHF or one of its requirements is not installed.
        RuntimeError: when OpenRLHF does not have the expected functions. A release that was not tried gives a warning.
    """
    check_release("openrlhf", TRIED, TRIED)
    _switch.off()
    utils = importlib.import_module("openrlhf.models.utils")
    importlib.import_module("openrlhf.models.actor")
    scored, _ = known(utils, "log_probs_from_logits", ("logits", "labels", "temperature"))
    entropies, _ = known(utils, "compute_entropy", ("logits",))
    return _switch.on(
        [Replacement(scored, log_probs_from_logits, "openrlhf"), Replacement(entropies, compute_entropy, "openrlhf")]
    )


def unpatch() -> None:
    """Restore OpenRLHF's own functions. Without a patch it does nothing."""
    _switch.off()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi of each label.

    Args:
        logits: [..., V]; left as they are, while OpenRLHF's own divides them by the temperature.
        labels: [...], integers.
        temperature: of the logits, > 0.

    Returns:
        [...] float32, also for 16-bit logits.
    """
    return logprobs(logits, labels, readout=Readout(temperature=temperature))


def compute_entropy(logits: Tensor) -> Tensor:
    """H of each distribution, [...] float32, from logits [..., V]."""
    return entropy(logits)
