"""axolotl's trainers on this package's kernels: a plugin that a configuration names.

    plugins:
      - unirl_kernels.integrations.axolotl.FusedLossPlugin

Tried with axolotl 0.19. SFT's loss is that of the model, which transformers keeps in a table. Trainers for DPO, GRPO
and their relatives score tokens by TRL's functions of logits, in whose place axolotl puts functions of its own. The
plugin replaces all of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from axolotl.integrations.base import BasePlugin

from unirl_kernels.integrations.patching import Patch, Replacement, Switch, known, parameters_of
from unirl_kernels.integrations.transformers import LOSS_PARAMETERS, causal_lm_loss
from unirl_kernels.integrations.trl import LogitFunctions
from unirl_kernels.integrations.versions import AXOLOTL, check_release
from unirl_kernels.plan import Plan

SCORES = {"selective_log_softmax": ["logits", "index"], "entropy_from_logits": ["logits", "chunk_size"]}
"""Functions of logits that are replaced, and what each takes."""

OTHER_LOSSES = (
    *("cut_cross_entropy", "chunked_cross_entropy", "flash_attn_cross_entropy", "use_eaft"),
    *("liger_cross_entropy", "liger_fused_linear_cross_entropy", "dpo_use_liger_kernel"),
)
"""Options that make the loss in another way."""

WHERE = ("trl", "axolotl")

_switch = Switch()


def patch() -> Patch:
    """Let axolotl compute losses, log-probabilities, entropies and gradients with this package, until ``unpatch()``.

    The plugin calls it. Every causal language model of transformers that has not overridden its loss gets
    ``causal_lm_loss``. Patching again changes nothing. In a ``with`` statement the patch ends with the block.

    Returns:
        ``Patch``.

    Raises:
        RuntimeError: when transformers or TRL does not have what was looked for. A release of axolotl that was not
            tried warns.
    """
    check_release("axolotl", AXOLOTL, AXOLOTL)
    _switch.off()
    losses = importlib.import_module("transformers.loss.loss_utils")
    loss, _ = known(losses, "ForCausalLMLoss", LOSS_PARAMETERS)
    utils = importlib.import_module("trl.trainer.utils")
    replacements = [Replacement(loss, causal_lm_loss, losses.__name__)]
    for name, taken in SCORES.items():
        known(utils, name, taken)
        # TRL's own, in modules that were imported before axolotl replaced it, and axolotl's.
        for old in _functions(name, taken):
            replacements.append(Replacement(old, getattr(LogitFunctions(Plan()), name), WHERE))
    return _switch.on(replacements)


def unpatch() -> None:
    """Give axolotl, TRL and transformers their own functions back. Without a patch it does nothing."""
    _switch.off()


def _functions(name: str, taken: list[str]) -> Iterator[Any]:
    """Each function of this name in the modules of TRL and axolotl, once."""
    seen: list[Any] = []
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in WHERE or (found := vars(module).get(name)) is None:
            continue
        if parameters_of(found) == taken and not any(found is other for other in seen):
            seen.append(found)
            yield found


class FusedLossPlugin(BasePlugin):  # type: ignore[misc]
    """``patch()`` from before axolotl builds the model until training is over, for a configuration that names it.

    Raises:
        ValueError: before the model is built, when the configuration makes the loss in another way
            (``OTHER_LOSSES``, ``trl.use_liger_loss``), by the name of the option.
        RuntimeError: as ``patch``.
    """

    def pre_model_load(self, cfg: Any) -> None:
        """Called after axolotl's own patches."""
        if others := [name for name in OTHER_LOSSES if cfg.get(name)]:
            raise ValueError(f"{others[0]} must be off with FusedLossPlugin, got {cfg.get(others[0])!r}: remove one")
        if (cfg.get("trl") or {}).get("use_liger_loss"):
            raise ValueError("trl.use_liger_loss must be off with FusedLossPlugin, got True: remove one")
        patch()

    def post_train_unload(self, cfg: Any) -> None:
        """Called when training is over."""
        _switch.off()
