"""What users get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unirl_kernels.backends import RowObservations
from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.objectives.policy import kl_estimate


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, differentiable in what they were computed from. Target's shape,
    float32 (float64 for float64 input); 0 where the target is ``IGNORE``.

    Args:
        logp: log pi(o_t) = z_y - lse, <= 0, nats.
        entropy: H = lse - sum_j p_j z_j of the whole distribution, in [0, log V], nats.
        lse: log sum_j exp(z_j).
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class TokenObservations(NamedTuple):
    """``TokenStats``, and what else can be observed of each token's distribution, without a gradient. Target's shape,
    float32 (float64 for float64 input); 0, and argmax -1, where the target is ``IGNORE``.

    Args:
        logp, entropy, lse: as in ``TokenStats``, differentiable.
        log_sum_sq_probs: log sum_j p_j^2, in [-log V, 0], nats; minus the Renyi entropy of order 2.
        mean_logit: mean of z_j over the vocabulary; -inf where a z_j is.
        argmax: int64, the first column with the largest z; -1 where the target is not in the vocabulary, or a logit is
            NaN or inf. ``argmax == target`` says whether the target is the top word.
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    argmax: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Tensor]) -> TokenObservations:
        """From ``RowObservations``, which have one field more."""
        named = RowObservations(*rows)._asdict()
        return cls(**{name: named[name] for name in cls._fields})


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What ``fused_loss`` and ``fused_linear_loss`` return.

    Args:
        loss: 0-dim, float32 (float64 for float64 input), differentiable in what it was computed from.
        logp, entropy: target's shape, detached; 0 where the target is ``IGNORE``.
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    _batch: Batch
    _loss: Loss

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Means over the valid tokens, 0-dim tensors, computed when read and without waiting for a device.

        ``entropy``; ``ratio_mean``, pi / pi_old (1 on policy); ``kl``, estimate k3 of KL(pi || pi_ref), where the
        batch has ``ref_logp``; and what the objective adds, such as ``clip_fraction``.
        """
        with torch.no_grad():
            tokens = Tokens(self._batch, self.logp, self.entropy, torch.zeros_like(self.logp))
            values = {"entropy": tokens.entropy, "ratio_mean": torch.exp(tokens.logp - tokens.old_logp)}
            if self._batch.ref_logp is not None:
                values["kl"] = kl_estimate(tokens)
            values |= getattr(self._loss.objective, "metrics", lambda t: {})(tokens)
            valid = self._batch.valid.reshape(-1)
            n = valid.sum().clamp(min=1)
            return {name: torch.where(valid, x, torch.zeros_like(x)).sum() / n for name, x in values.items()}
