"""What an objective sees when it runs as plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.batch import Batch


class Tokens:
    """The tokens of a batch, as flat vectors over T places; gradients flow through ``logp``, ``entropy``, ``lse``.

    Ignored places hold zeros and weigh nothing. Token-scope objectives use the fields alone; objectives that
    look at whole sequences also use the methods.

    Args:
        batch: the batch.
        logp, entropy, lse: target's shape, the statistics of each place.
    """

    def __init__(self, batch: Batch, logp: Tensor, entropy: Tensor, lse: Tensor) -> None:
        self._batch = batch
        self.logp = logp.reshape(-1)
        self.entropy = entropy.reshape(-1)
        self.lse = lse.reshape(-1)

    @property
    def advantage(self) -> Tensor:
        """[T]: the advantage of each token, or of its sequence."""
        advantage = self._field("advantage")
        return self._used(advantage if advantage.shape == self._batch.target.shape else self._spread(advantage))

    @property
    def old_logp(self) -> Tensor:
        """[T]: log-probabilities under the policy that sampled; on policy, ``logp`` without its gradient."""
        if self._batch.old_logp is None:
            return self.logp.detach()
        return self._used(self._batch.old_logp)

    @property
    def ref_logp(self) -> Tensor:
        """[T]: log-probabilities under the reference policy."""
        return self._used(self._field("ref_logp"))

    def _field(self, name: str) -> Tensor:
        value: Tensor | None = getattr(self._batch, name)
        if value is None:
            raise ValueError(f"the objective reads {name}, but batch.{name} is None")
        return value

    def _used(self, x: Tensor) -> Tensor:
        # Whatever stands at ignored places (infinities, NaN) must not reach the loss as 0 * inf.
        return torch.where(self._batch.valid, x, torch.zeros_like(x)).reshape(-1).to(self.logp.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        return self._batch.per_token(x)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Spread one value per sequence, [S], over its tokens: [T]."""
        return self._spread(x).reshape(-1)

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Sum of [T] values over the valid tokens of each sequence: [S]. Added in fp64, in the sequence's order."""
        x = torch.where(self._batch.valid.reshape(-1), x, torch.zeros_like(x))
        sums = torch.segment_reduce(x.double(), "sum", offsets=self._batch.offsets, unsafe=True, initial=0.0)
        return sums.to(x.dtype)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Mean of [T] values over the valid tokens of each sequence: [S]; 0 for a sequence without tokens."""
        return self.sequence_sum(x) / self._batch.lengths.clamp(min=1)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split one value per sequence, [S], into the chosen and the rejected: [S/2] each.

        Raises:
            ValueError: when the number of sequences is odd.
        """
        n = self._batch.n_pairs
        return x[:n], x[n:]
