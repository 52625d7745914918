"""What is computed: a loss or statistics on random logits of a stated size."""

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

SEQUENCES = 4
LEAST_TOKENS_OF_FOUR = 64
"""From here on the tokens form four sequences; fewer form one (two for DPO)."""


@dataclass(frozen=True)
class Work:
    """A piece of work that kernels are compared on.

    Args:
        loss: a name in ``reference.LOSSES``.
        mode: a key of ``MODES``.
        tokens: rows of logits, T; the last one of each sequence is ignored, as with ``shift_targets``.
        vocab: columns, V.
        dtype: of the logits, a key of ``DTYPES``.
        device: as torch names it.
        on_policy: no ``old_logp``: the ratio is 1.
        seed: of the random numbers.

    Raises:
        ValueError: when the tokens do not form the sequences that the loss needs.
    """

    loss: str = "grpo"
    mode: str = FUSED
    tokens: int = 4096
    vocab: int = 151936
    dtype: str = "bf16"
    device: str = "cpu"
    on_policy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens % self.sequences:
            raise ValueError(f"tokens must be divisible by {self.sequences} sequences, got {self.tokens}")

    @property
    def sequences(self) -> int:
        if self.tokens >= LEAST_TOKENS_OF_FOUR:
            return SEQUENCES
        return 2 if self.loss == "dpo" else 1

    @property
    def length(self) -> int:
        """Places of a sequence, the ignored one included."""
        return self.tokens // self.sequences

    @property
    def valid_tokens(self) -> int:
        return self.tokens - self.sequences if self.length > 1 else self.tokens

    @cached_property
    def recipe(self) -> uk.Loss:
        """The loss with its default numbers, which are those of ``reference``, too."""
        loss: uk.Loss = getattr(uk, self.loss)()
        return loss

    @property
    def has_gradient(self) -> bool:
        return self.mode != STATS

    @property
    def row_bytes(self) -> int:
        return self.vocab * DTYPES[self.dtype].itemsize

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.row_bytes
