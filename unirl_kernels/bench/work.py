"""What is computed: a loss or statistics on random logits of a stated size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels import reference
from unirl_kernels.objectives import Tokens

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
SUREST = 20
"""A target's logit is raised by up to this: probabilities from chance to nearly 1."""
CHUNK_BYTES = 2**26


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

    @property
    def floor_bytes(self) -> int:
        """Memory traffic that no kernel can do without: valid rows read, and every row of the gradient written.

        Statistics come before a gradient that depends on all of them, so that such a loss reads twice.
        """
        reads = {STATS: 1, STATS_BACKWARD: 1, FORWARD_BACKWARD: 2, FUSED: 1 if self.recipe.scope == "token" else 2}
        written = self.tokens if self.has_gradient else 0
        return (reads[self.mode] * self.valid_tokens + written) * self.row_bytes

    def small(self) -> Work:
        """The same with few tokens: enough to load code and create threads."""
        return replace(self, tokens=min(self.tokens, self.sequences * 2))


class Values(NamedTuple):
    """What a provider computes of the logits, differentiable in them. None: it does not say."""

    loss: Tensor | None = None  # 0-dim
    logp: Tensor | None = None  # [B, L]
    entropy: Tensor | None = None  # [B, L]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a piece of work.

    Args:
        work: what they were made for.
        logits: [B, L, V], peaked as a trained model's; not to be written.
        batch: targets, advantages of both signs, old and reference policies a realistic distance away.
        d_logp, d_entropy: [B, L] float32, upstream gradients for statistics; 0 at ignored places.
    """

    work: Work
    logits: Tensor
    batch: uk.Batch
    d_logp: Tensor
    d_entropy: Tensor

    @staticmethod
    def make(work: Work) -> Inputs:
        device = torch.device(work.device)
        generator = torch.Generator(device).manual_seed(work.seed)
        shape = (work.sequences, work.length)
        random: dict[str, Any] = {"generator": generator, "device": device}
        target = torch.randint(0, work.vocab, shape, **random)
        logits = torch.empty(*shape, work.vocab, dtype=DTYPES[work.dtype], device=device)
        logits.normal_(0, 2, generator=generator)
        bonus = torch.randint(0, SUREST, (*shape, 1), **random).to(logits.dtype)
        logits.scatter_add_(-1, target.unsqueeze(-1), bonus)
        if work.length > 1:
            target[:, -1] = uk.IGNORE
        logp = log_probs(logits, target, torch.float32)
        old_logp, ref_logp = ((logp + d * torch.randn(shape, **random)).clamp(max=0) for d in (0.3, 0.2))
        advantage = torch.randn(work.sequences, **random)
        if work.loss in ("rft", "online_rft"):
            advantage = (advantage > 0).float()
        batch = uk.Batch(target, advantage, None if work.on_policy else old_logp, ref_logp)
        d_logp, d_entropy = (torch.where(batch.valid, torch.randn(shape, **random), 0) for _ in range(2))
        return Inputs(work, logits, batch, d_logp, d_entropy)

    @cached_property
    def index(self) -> Tensor:
        """[B, L]: targets for those who cannot take ``IGNORE``; any word stands at ignored places."""
        return self.batch.target.clamp(min=0)

    @cached_property
    def used(self) -> Tensor:
        """[B, L] bool: the tokens that count."""
        return self.batch.valid

    def composed(self, logp: Tensor) -> Values:
        """The loss as plain PyTorch on log-probabilities, [B, L], as trainers compute it."""
        loss = self.work.recipe
        nothing = torch.zeros_like(logp)
        values = loss.objective(Tokens(self.batch, logp, nothing, nothing))
        weights = loss.aggregation.weights(self.batch).reshape(-1)
        return Values((values * weights.to(values.dtype)).sum(), logp)


def log_probs(logits: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """log pi(o_t), [B, L], in ``dtype`` arithmetic, a few rows at a time."""
    rows, flat = logits.flatten(0, 1), target.flatten()
    at_once = max(1, CHUNK_BYTES // (rows.shape[-1] * dtype.itemsize))
    pairs = zip(rows.split(at_once), flat.split(at_once), strict=True)
    return torch.cat([reference.log_probs(x.to(dtype), y) for x, y in pairs]).view(target.shape)
