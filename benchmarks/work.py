"""What is computed: a loss or statistics on random logits, or hidden states and a weight, of a stated size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

import unirl_kernels as uk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FUSED, STATS, STATS_BACKWARD, FORWARD_BACKWARD = "fused", "stats", "stats-backward", "forward-backward"
MODES = {
    FUSED: "loss and gradient of the logits",
    STATS: "log-probability and entropy, no gradient",
    STATS_BACKWARD: "gradient of the logits from given gradients of log-probability and entropy",
    FORWARD_BACKWARD: "log-probability and entropy, then the gradient of the logits",
}

LINEAR_MODES = {
    FUSED: "loss and gradients of hidden states and weight",
    STATS: MODES[STATS],
    FORWARD_BACKWARD: "log-probability and entropy, then the gradients of hidden states and weight",
}
"""With a linear head."""

SEQUENCES = 4
LEAST_TOKENS_OF_FOUR = 64
"""From here on the tokens form four equal sequences, or two or one where they cannot; fewer form one (two for DPO)."""


@dataclass(frozen=True)
class Work:
    """A piece of work that kernels are compared on.

    Args:
        loss: a name in ``oracle.LOSSES``, or ``FILE.py:OBJECTIVE`` of a user.
        mode: a key of ``MODES``, or of ``LINEAR_MODES``.
        tokens: rows of logits, T; the last one of each sequence is ignored, as with ``shift_targets``.
        vocab: columns, V.
        dtype: of the logits, or of hidden states and weight, a key of ``DTYPES``.
        device: as torch names it.
        on_policy: no ``old_logp``: the ratio is 1.
        seed: of the random numbers.
        hidden: size of a hidden state, D, for a linear head; None for logits.
        chunk_bytes: ``max_chunk_bytes`` of this package's plan for a linear head; None for the default.

    Raises:
        ValueError: when the tokens do not form the pairs that the loss needs, or the level lacks the mode.
    """

    loss: str = "grpo"
    mode: str = FUSED
    tokens: int = 4096
    vocab: int = 151936
    dtype: str = "bf16"
    device: str = "cpu"
    on_policy: bool = False
    seed: int = 0
    hidden: int | None = None
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in self.modes:
            level = "" if self.hidden is None else " for a linear head"
            raise ValueError(f"mode must be among {', '.join(self.modes)}{level}, got {self.mode}")
        if self.paired and self.tokens % 2:
            raise ValueError(f"tokens must form two equal sequences for pairs, got {self.tokens}")

    @property
    def modes(self) -> dict[str, str]:
        """What can be computed at this level, in words."""
        return MODES if self.hidden is None else LINEAR_MODES

    @property
    def sequences(self) -> int:
        most = SEQUENCES if self.tokens >= LEAST_TOKENS_OF_FOUR else 2 if self.paired else 1
        return next(n for n in (SEQUENCES, 2, 1) if n <= most and self.tokens % n == 0)

    @property
    def length(self) -> int:
        """Places of a sequence, the ignored one included."""
        return self.tokens // self.sequences

    @property
    def valid_tokens(self) -> int:
        return self.tokens - self.sequences if self.length > 1 else self.tokens

    @cached_property
    def recipe(self) -> uk.Loss:
        """The loss with its default numbers, which are those of ``testing.oracle``, too; or the user's."""
        if self.own:
            from benchmarks.own_loss import own_loss  # runs the user's file

            return own_loss(self.loss)
        loss: uk.Loss = getattr(uk, self.loss)()
        return loss

    @property
    def own(self) -> bool:
        """Whether the loss is a user's."""
        return ":" in self.loss

    @property
    def paired(self) -> bool:
        """Whether the loss is one of pairs."""
        return self.loss == "dpo" or (self.own and self.recipe.scope == "pair")

    @property
    def has_gradient(self) -> bool:
        return self.mode != STATS

    @property
    def row_bytes(self) -> int:
        return self.vocab * DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.row_bytes
