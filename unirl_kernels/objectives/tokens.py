"""``Tokens``: the argument of an objective that runs as plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.batch import Batch
from unirl_kernels.ranks.collectives import SumOverGroup


class Tokens:
    """The tokens of a batch, as flat vectors over T positions; gradients flow through ``logp``, ``entropy``, ``lse``.

    Every field of the batch is an attribute: ``t.advantage``, ``t.old_logp``, ``t.ref_logp``, and ``t.<name>`` for each
    name in ``batch.fields``. It is [T], whatever the shape of the given field. Narrow dtypes are widened, so that
    arithmetic on them neither rounds nor wraps around, as in the one-pass kernels: floating-point fields have at least
    the precision of the statistics, integers are int64. On policy ``t.old_logp`` is ``logp`` without its gradient.

    Ignored positions hold 0 and have weight 0. Objectives of token scope use only these vectors. Objectives of a wider
    scope also use the methods.

    Args:
        batch: the batch.
        logp, entropy, lse: target's shape, the statistics of each position.
    """

    def __init__(self, batch: Batch, logp: Tensor, entropy: Tensor, lse: Tensor) -> None:
        self._batch = batch
        self.logp = logp.reshape(-1)
        self.entropy = entropy.reshape(-1)
        self.lse = lse.reshape(-1)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "old_logp" and self._batch.on_policy:
            return self.logp.detach()
        return self._used(self._widened(self._per_token(name)))

    def _per_token(self, name: str) -> Tensor:
        return self._batch.per_token_field(name)

    def _widened(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return x
        return x.to(torch.promote_types(x.dtype, self.logp.dtype) if x.is_floating_point() else torch.int64)

    def _used(self, x: Tensor) -> Tensor:
        # Infinities and NaN at ignored positions must not reach the loss as 0 * inf.
        return torch.where(self._batch.valid, x, torch.zeros_like(x)).reshape(-1)

    @property
    def valid(self) -> Tensor:
        """[T] bool: positions that are not ignored."""
        return self._batch.valid.reshape(-1)

    @property
    def lengths(self) -> Tensor:
        """[S] int64: |o|, the valid tokens of each sequence."""
        return self._batch.lengths

    @property
    def positions(self) -> Tensor:
        """[T] int64: the number of valid tokens of its sequence before each position."""
        counted, sequence = torch.nn.functional.pad(self.valid.cumsum(0), (1, 0)), self._batch.sequence_of_token
        here, before = counted[:-1] - counted[self._batch.offsets[sequence]], self._batch.lengths_before
        return here if before is None else here + before[sequence]

    @property
    def n_sequences(self) -> int:
        """S, the number of sequences."""
        return self._batch.n_sequences

    @property
    def n_pairs(self) -> int:
        """S / 2, the number of pairs."""
        return self._batch.n_pairs

    def sequence_field(self, name: str) -> Tensor:
        """A field that was given with one value per sequence, or one for all: [S].

        Raises:
            ValueError: when the batch lacks it, or it has a value per token.
        """
        return self._widened(self._batch.per_sequence_field(name))

    def to_tokens(self, x: Tensor) -> Tensor:
        """Spread one value per sequence, [S], over its tokens: [T]. Gradients of the tokens are added in fp64."""
        if not x.requires_grad:
            return self._batch.per_token(x).reshape(-1)
        return self._batch.per_token(x.double()).reshape(-1).to(x.dtype)

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Sum of [T] values over the valid tokens of each sequence: [S]. Added in fp64, in the sequence's order."""
        x = torch.where(self.valid, x, torch.zeros_like(x))
        sums = torch.segment_reduce(x.double(), "sum", offsets=self._batch.offsets, unsafe=True, initial=0.0)
        if self._batch.ranks is not None:
            sums = SumOverGroup.apply(sums, self._batch.ranks)
        return sums.to(x.dtype if x.is_floating_point() else self.logp.dtype)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Mean of [T] values over the valid tokens of each sequence: [S]; 0 for a sequence without tokens."""
        return self.sequence_sum(x) / self.lengths.clamp(min=1)

    def sequence_scan(self, x: Tensor, decay: float | Tensor = 1.0, reverse: bool = False) -> Tensor:
        """Discounted sums along each sequence: [T].

            y_t = x_t + decay_t y_{t-1}        or, reversed,        y_t = x_t + decay_t y_{t+1}

        with y = 0 outside the sequence. Ignored positions are skipped: their x is taken as 0 and their decay as 1. A
        cumulative product of positive values is ``exp(sequence_scan(log(x)))``. Added in fp64.

        Args:
            x: [T].
            decay: a number or [T].
            reverse: whether the sums start at the end of a sequence.

        Raises:
            NotImplementedError: when sequences are split over a ``sequence_group``.
        """
        if self._batch.ranks is not None:
            raise NotImplementedError("sequence_scan must have whole sequences, got a batch with a sequence_group")
        sequence = self._batch.sequence_of_token
        y = torch.where(self.valid, x, torch.zeros_like(x)).double()
        factor = torch.where(self.valid, torch.as_tensor(decay, dtype=y.dtype, device=y.device), 1)
        if reverse:
            y, factor, sequence = y.flip(0), factor.flip(0), sequence.flip(0)
        # Scan of Hillis and Steele: after each step a position has summed twice as many.
        step = 1
        while step < y.numel():
            before = torch.nn.functional.pad(sequence[:-step], (step, 0), value=-1) == sequence
            of_before = torch.nn.functional.pad(y[:-step], (step, 0))
            factor_before = torch.nn.functional.pad(factor[:-step], (step, 0))
            y = torch.where(before, y + factor * of_before, y)
            factor = torch.where(before, factor * factor_before, 0)
            step *= 2
        return (y.flip(0) if reverse else y).to(x.dtype if x.is_floating_point() else self.logp.dtype)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split one value per sequence, [S], into the chosen and the rejected: [S/2] each.

        Raises:
            ValueError: when the number of sequences is odd.
        """
        return self._batch.split_pairs(x)

    def same_group(self, field: str = "group") -> Tensor:
        """[S, S] bool: whether two sequences have the same group, given by a field with one value per sequence."""
        group = self.sequence_field(field)
        return group.unsqueeze(0) == group.unsqueeze(1)

    def group_sum(self, x: Tensor, field: str = "group") -> Tensor:
        """Sum of one value per sequence, [S], over the sequences of the same group: [S]."""
        return torch.where(self.same_group(field), x, torch.zeros_like(x)).sum(-1)

    def group_mean(self, x: Tensor, field: str = "group") -> Tensor:
        """Mean of one value per sequence, [S], over the sequences of the same group: [S]."""
        return self.group_sum(x, field) / self.same_group(field).sum(-1)
