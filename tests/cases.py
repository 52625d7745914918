"""The table of cases: losses, and shapes with the reason for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels.testing import oracle


@dataclass(frozen=True)
class LossCase:
    name: str
    make: Callable[[], uk.Loss]
    algorithm: str
    hyper: dict[str, Any] = field(default_factory=dict)
    verdicts: bool = False  # advantages in {0, 1}

    def __str__(self) -> str:
        return self.name


def with_aggregation(loss: uk.Loss, aggregation: Any) -> uk.Loss:
    return uk.Loss(loss.objective, aggregation)


LOSSES = [
    LossCase("sft", uk.sft, "sft"),
    LossCase("rft", uk.rft, "rft", verdicts=True),
    LossCase("online_rft", uk.online_rft, "online_rft", verdicts=True),
    LossCase("dpo", uk.dpo, "dpo"),
    LossCase("dpo_mean", lambda: uk.dpo(0.5, length_normalized=True), "dpo", {"beta": 0.5, "length_normalized": True}),
    LossCase("ppo", uk.ppo, "ppo"),
    LossCase("ppo_asymmetric", lambda: uk.ppo((0.1, 0.28)), "ppo", {"clip": (0.1, 0.28)}),
    LossCase("grpo", uk.grpo, "grpo"),
    LossCase("grpo_unclipped", lambda: uk.grpo(None, 0.1), "grpo", {"clip": None, "beta": 0.1}),
    LossCase("grpo_without_kl", lambda: uk.grpo(beta=0.0), "grpo", {"beta": 0.0}),
    LossCase(
        "grpo_token_mean",
        lambda: with_aggregation(uk.grpo(), uk.TokenMean()),
        "grpo",
        {"how": "token_mean"},
    ),
    LossCase(
        "grpo_global_token_mean",
        lambda: with_aggregation(uk.grpo(), uk.TokenMean(torch.tensor(1000.0))),
        "grpo",
        {"how": "token_mean", "n": 1000.0},
    ),
    LossCase(
        "grpo_fixed_length",
        lambda: with_aggregation(uk.grpo(), uk.FixedLength(64)),
        "grpo",
        {"how": "fixed_length", "n": 64},
    ),
]

BY_NAME = {case.name: case for case in LOSSES}


@dataclass(frozen=True)
class Shape:
    """A shape at which a kernel may fail, with the reason."""

    name: str
    reason: str
    lengths: tuple[int, ...]  # valid tokens of each sequence; an even number of sequences, for DPO
    vocab: int
    dtype: torch.dtype = torch.float32
    packed: bool = False
    strides: str = "contiguous"  # "sliced": logits[:, :-1] of longer rows; "padded": rows longer than V
    fill: str = "peaked"  # "masked": -inf outside the largest logits; "certain": p_y within 1e-6 of 1

    @property
    def n_logits(self) -> int:
        positions = sum(self.lengths) if self.packed else len(self.lengths) * max(*self.lengths, 1)
        return positions * self.vocab

    def __str__(self) -> str:
        return self.name


RAGGED = (3, 1, 0, 4)

SHAPES = [
    Shape("small", "fits one block; ragged, with a sequence of no tokens", RAGGED, 101),
    Shape("packed", "cu_seqlens instead of padding", RAGGED, 101, packed=True),
    Shape("one_word", "V = 1: log p = 0, no gradient", (2, 1), 1),
    Shape("seven_words", "V below any vector width", (3, 2), 7),
    Shape("below_block", "V one below the Triton block", (1, 1), 2047),
    Shape("at_block", "V exactly a block", (1, 1), 2048),
    Shape("above_block", "V one above the block: a tail of one column", (1, 1), 2049),
    Shape("two_blocks", "V above the largest block of a kernel, odd", (1, 1), 8193),
    Shape("one_token", "T = 1 in each sequence", (1, 1), 101),
    Shape("nothing", "every token ignored: loss 0, gradient 0", (0, 0), 101),
    Shape("sliced", "logits[:, :-1]: rows of a larger tensor, two strides", RAGGED, 101, strides="sliced"),
    Shape("row_padding", "row stride above V and odd: no alignment to rely on", RAGGED, 101, strides="padded"),
    Shape("bf16", "half the bits", RAGGED, 515, torch.bfloat16),
    Shape("fp16", "narrow range", RAGGED, 515, torch.float16),
    Shape("bf16_sliced_packed", "all at once", RAGGED, 515, torch.bfloat16, packed=True, strides="padded"),
    Shape("masked", "-inf logits: top-k masks, padded vocabularies", RAGGED, 515, fill="masked"),
    Shape("masked_bf16", "-inf logits in bf16", RAGGED, 515, torch.bfloat16, fill="masked"),
    Shape("certain", "p_y -> 1: the target's gradient cancels", RAGGED, 515, fill="certain"),
    Shape("certain_bf16", "p_y -> 1 in bf16", RAGGED, 515, torch.bfloat16, fill="certain"),
    Shape("smollm", "SmolLM2's vocabulary", (2, 1), 49152),
    Shape("gpt2", "an odd vocabulary", (1, 2), 50257),
    Shape("qwen", "a large vocabulary, few rows: split over threads", (1, 1), 151936),
    Shape("qwen_bf16", "a large vocabulary in bf16", (1, 1), 151936, torch.bfloat16),
]


def make_logits(shape: Shape, target: Tensor) -> Tensor:
    """Logits as a trained model gives them: most positions spread out, some sure of their target."""
    vocab = shape.vocab
    extra = {"contiguous": (0, 0), "sliced": (1, 0), "padded": (0, 3)}[shape.strides]
    *outer, positions = target.shape
    logits = torch.randn(*outer, positions + extra[0], vocab + extra[1]) * 2
    logits = logits[..., :positions, :vocab]
    index = target.clamp(min=0).unsqueeze(-1)
    bonus = torch.randint(0, 8, (*target.shape, 1)).float()
    if shape.fill == "certain":
        bonus = torch.full_like(bonus, 30.0)
    logits.scatter_add_(-1, index, bonus)
    if shape.fill == "masked":
        kept = torch.rand(logits.shape) < 0.1
        kept.scatter_(-1, index, True)
        logits.masked_fill_(~kept, float("-inf"))
    if shape.strides == "contiguous":
        return logits.to(shape.dtype)
    base = logits if logits._base is None else logits._base
    return base.to(shape.dtype)[..., :positions, :vocab]


def make_target(shape: Shape) -> tuple[Tensor, Tensor | None]:
    """Targets with the shape's lengths, and cu_seqlens for the packed layout."""
    if shape.packed:
        cu_seqlens = torch.tensor([0, *torch.tensor(shape.lengths).cumsum(0).tolist()], dtype=torch.int32)
        return torch.randint(0, shape.vocab, (sum(shape.lengths),)), cu_seqlens
    longest = max(*shape.lengths, 1)
    target = torch.randint(0, shape.vocab, (len(shape.lengths), longest))
    for row, length in zip(target, shape.lengths, strict=True):
        # Prompts stand in front, padding behind: both kinds of ignored positions.
        ahead = (longest - length) // 2
        row[:ahead] = uk.IGNORE
        row[ahead + length :] = uk.IGNORE
    return target, None


def make_case(shape: Shape, loss: LossCase, device: str = "cpu", seed: int = 0) -> tuple[Tensor, uk.Batch]:
    """Logits and batch; old and reference policies a realistic distance away, advantages of both signs."""
    torch.manual_seed(seed)
    target, cu_seqlens = make_target(shape)
    logits = make_logits(shape, target)
    logp = oracle.log_probs(logits.double(), target).float()
    old_logp = logp + 0.3 * torch.randn(logp.shape)
    ref_logp = logp + 0.2 * torch.randn(logp.shape)
    # Whatever stands at ignored positions must not matter.
    old_logp[target == uk.IGNORE] = float("nan")
    ref_logp[target == uk.IGNORE] = float("inf")
    n = len(shape.lengths)
    advantage = (torch.arange(n) % 2).float() if loss.verdicts else torch.randn(n) + (torch.arange(n) % 2) * 2 - 1
    tensors = (target, advantage, old_logp, ref_logp, cu_seqlens)
    return logits.to(device), uk.Batch(*(None if x is None else x.to(device) for x in tensors))
