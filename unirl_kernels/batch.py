"""What a loss is computed on: targets, advantages, and log-probabilities of the old and reference policies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a token that is no part of the loss: prompt, padding, tool output. The only spelling of a mask."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of tokens to learn from, padded or packed.

    Padded, ``target`` is [B, L] and each row is a sequence (S = B). Packed, ``target`` is [T] and sequence s holds
    the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``. For DPO the first S/2 sequences are the chosen ones and
    the rest, in the same order, their rejected counterparts.

    Args:
        target: [B, L] or [T] int64, the token whose probability the logits at this place give, in [0, V), or
            ``IGNORE``.
        advantage: [S] or target's shape, float32: the advantage of a sequence or token; for RFT the verdict I(o)
            in {0, 1}.
        old_logp: target's shape, float32, <= 0: log-probabilities under the policy that sampled. None: on policy,
            the ratio is 1 and its gradient intact.
        ref_logp: target's shape, float32, <= 0: log-probabilities under the reference policy.
        cu_seqlens: [S + 1] int32, cumulative lengths from 0 to T; for the packed layout only.

    Raises:
        TypeError: when an argument is not a tensor of the stated dtype (float64 passes for float32).
        ValueError: when a shape, a device or the cumulative lengths do not fit.
    """

    target: Tensor  # [B, L] or [T]
    advantage: Tensor | None = None  # [S] or target's shape
    old_logp: Tensor | None = None  # target's shape
    ref_logp: Tensor | None = None  # target's shape
    cu_seqlens: Tensor | None = None  # [S + 1]

    def __post_init__(self) -> None:
        check_dtype("target", self.target, torch.int64)
        shape = tuple(self.target.shape)
        if len(shape) not in (1, 2):
            raise ValueError(f"target must have shape [B, L] or [T], got {shape}")
        if len(shape) == 1:
            self._check_packed()
        elif self.cu_seqlens is not None:
            raise ValueError(f"cu_seqlens is for packed targets of shape [T]; target has shape {shape}")
        for name, shapes in (
            ("advantage", ((self.n_sequences,), shape)),
            ("old_logp", (shape,)),
            ("ref_logp", (shape,)),
        ):
            if (value := getattr(self, name)) is not None:
                check_dtype(name, value, torch.float32, torch.float64)
                if tuple(value.shape) not in shapes:
                    expected = " or ".join(str(s) for s in shapes)
                    raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
                if value.device != self.target.device:
                    raise ValueError(f"{name} must be on {self.target.device} like target, got {value.device}")
                if value.requires_grad:
                    raise ValueError(f"{name} must not require a gradient (gradients flow to the logits): detach it")

    def _check_packed(self) -> None:
        if self.cu_seqlens is None:
            raise ValueError(f"cu_seqlens must be given for a packed target of shape {tuple(self.target.shape)}")
        check_dtype("cu_seqlens", self.cu_seqlens, torch.int32, torch.int64)
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens must have shape [S + 1], S >= 1, got {tuple(self.cu_seqlens.shape)}")
        if self.cu_seqlens.device != self.target.device:
            raise ValueError(f"cu_seqlens must be on {self.target.device} like target, got {self.cu_seqlens.device}")
        # On an accelerator reading the values would wait for the device.
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            ends = self.cu_seqlens
            if ends[0] != 0 or ends[-1] != self.target.numel() or bool((ends.diff() < 0).any()):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to {self.target.numel()} (the tokens of target), got {ends.tolist()}"
                )

    @property
    def n_sequences(self) -> int:
        return self.target.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def n_pairs(self) -> int:
        """S / 2, for losses of pairs.

        Raises:
            ValueError: when the number of sequences is odd.
        """
        if self.n_sequences % 2:
            raise ValueError(
                "target must hold an even number of sequences, the chosen and then the rejected, "
                f"got {self.n_sequences}"
            )
        return self.n_sequences // 2

    @property
    def offsets(self) -> Tensor:
        """[S + 1] int64, rising, in [0, T]: sequence s holds the flat tokens offsets[s] to offsets[s + 1]."""
        if self.cu_seqlens is not None:
            # What could not be checked when the batch was made must not lead out of the tensors.
            return self.cu_seqlens.to(torch.int64).clamp(0, self.target.numel()).cummax(0).values
        n, length = self.target.shape
        return torch.arange(n + 1, device=self.target.device) * length

    @property
    def valid(self) -> Tensor:
        """Target's shape, bool: the tokens that count."""
        return self.target != IGNORE

    @property
    def lengths(self) -> Tensor:
        """[S] int64: |o|, the number of valid tokens of each sequence."""
        if self.cu_seqlens is None:
            return self.valid.sum(-1)
        before = torch.nn.functional.pad(self.valid.cumsum(0), (1, 0))
        return before[self.offsets].diff()

    def per_token(self, x: Tensor) -> Tensor:
        """Spread one value per sequence, [S], over the sequences' tokens: target's shape."""
        if self.cu_seqlens is None:
            return x.unsqueeze(-1).expand(self.target.shape)
        places = torch.arange(self.target.numel(), device=self.target.device)
        return x[torch.searchsorted(self.offsets[1:-1], places, right=True)]


def check_dtype(name: str, value: object, *dtypes: torch.dtype) -> None:
    """Raise a ``TypeError`` that names the argument unless it is a tensor of one of the dtypes."""
    expected = str(dtypes[0]).removeprefix("torch.")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {expected} tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")


def shift_targets(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Next-token targets for unsliced logits: place t is to predict token t + 1.

    Spares the copy of ``logits[:, :-1]``: the last place gets ``IGNORE``, and its row of logits costs nothing.

    Args:
        input_ids: [B, L] int64, the tokens given to the model.
        mask: [B, L] bool or 0/1, whether each *token* is part of the loss (a completion's token, not padding).

    Returns:
        [B, L] int64: ``input_ids[:, t + 1]`` where that token is part of the loss, else ``IGNORE``.

    Raises:
        TypeError: when ``input_ids`` is not an int64 tensor.
        ValueError: when the shapes do not fit.
    """
    check_dtype("input_ids", input_ids, torch.int64)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape [B, L], got {tuple(input_ids.shape)}")
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(f"mask must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        input_ids = torch.where(mask.bool(), input_ids, IGNORE)
    return torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORE)


def group_advantages(rewards: Tensor, group_size: int, *, eps: float = 1e-4) -> Tensor:
    """Advantages relative to the group: how much better a sample is than the others for the same question.

        A_i = (r_i - mean(r)) / (std(r) + eps)         over the group of sample i

    Source: Shao et al. 2024 (arXiv:2402.03300v3), section 4.1.2; std with Bessel's correction, eps as in TRL.

    Args:
        rewards: [S] float, the samples of a question next to each other.
        group_size: samples per question, at least 2; divides S.
        eps: keeps a group of equal rewards at advantage 0.

    Returns:
        [S] float32 (float64 for float64 rewards).

    Raises:
        TypeError: when ``rewards`` is not a floating-point tensor.
        ValueError: when ``rewards`` is not [S], or ``group_size`` does not divide S.
    """
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        got = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
        raise TypeError(f"rewards must be a floating-point tensor, got {got}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [S], got {tuple(rewards.shape)}")
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"group_size must be at least 2 and divide the {rewards.numel()} rewards, got {group_size}")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (groups.std(-1, keepdim=True) + eps)).view(-1)
