"""Return types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from unirl_kernels.batch import Batch
from unirl_kernels.objectives import Loss, Tokens
from unirl_kernels.objectives.penalties import kl_estimate
from unirl_kernels.objectives.policy import ratio_to_old


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, differentiable in logits, or in hidden, weight and bias.

    Each has target's shape, in float32 (float64 for float64 input), and is 0 where the target is ``IGNORE``.

    Args:
        logp: log pi(o_t) = z_y - lse, <= 0, nats.
        entropy: H = lse - sum_j p_j z_j of the whole distribution, in [0, log V], nats.
        lse: log sum_j exp(z_j).

    Examples:
        >>> logp, entropy, lse = uk.token_stats(torch.zeros(1, 1, 4), torch.tensor([[3]]))
        >>> logp, entropy, lse  # -log 4, log 4, log 4
        (tensor([[-1.3863]]), tensor([[1.3863]]), tensor([[1.3863]]))
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class TokenObservations(NamedTuple):
    """``TokenStats``, and three more values of each token's distribution that have no gradient.

    Each has target's shape, in float32 (float64 for float64 input). Where the target is ``IGNORE`` the argmax is -1 and
    the others are 0.

    Args:
        logp: as in ``TokenStats``, differentiable.
        entropy: as in ``TokenStats``, differentiable.
        lse: as in ``TokenStats``, differentiable.
        log_sum_sq_probs: log sum_j p_j^2, in [-log V, 0], nats; minus the Renyi entropy of order 2.
        mean_logit: mean of z_j over the vocabulary; -inf if a z_j is -inf.
        argmax: int64, the first column with the largest z; -1 where the target is not in the vocabulary, or a logit is
            NaN or inf. ``argmax == target`` says whether the target is the most probable token.

    Examples:
        >>> target = torch.tensor([[1]])
        >>> seen = uk.token_observations(torch.tensor([[[0.0, 3.0, 1.0]]]), target)
        >>> seen.argmax == target
        tensor([[True]])
    """

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    argmax: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[Tensor]) -> TokenObservations:
        """From ``RowStats`` and ``RowObservations``, which also have the largest logit."""
        logp, entropy, lse, log_sum_sq_probs, mean_logit, _, argmax = rows
        return cls(logp, entropy, lse, log_sum_sq_probs, mean_logit, argmax)


@dataclass(frozen=True, eq=False)
class MetricParts:
    """A metric in parts that ranks can reduce: add sums and counts, take the smallest min and the largest max.

    Args:
        sum: 0-dim, the sum of the values.
        count: 0-dim, the number of values.
        min: 0-dim, the smallest value; inf if there are none.
        max: 0-dim, the largest value; -inf if there are none.

    Examples:
        >>> logits = torch.zeros(1, 2, 4)
        >>> out = uk.fused_loss(logits, uk.Batch(torch.tensor([[3, 1]])), uk.sft())
        >>> parts = out.metric_parts["entropy"]
        >>> parts.sum, parts.count, parts.mean
        (tensor(2.7726), tensor(2.), tensor(1.3863))
    """

    sum: Tensor
    count: Tensor
    min: Tensor
    max: Tensor

    @property
    def mean(self) -> Tensor:
        """sum / count; 0 if there are no values."""
        return self.sum / self.count.clamp(min=1)


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What ``fused_loss`` and ``fused_linear_loss`` return.

    Args:
        loss: 0-dim, float32 (float64 for float64 input), differentiable in logits, or in hidden, weight and bias.
        logp: target's shape, detached; 0 where the target is ``IGNORE``.
        entropy: target's shape, detached; 0 where the target is ``IGNORE``.
        lse: target's shape, detached; 0 where the target is ``IGNORE``.

    Examples:
        >>> batch = uk.Batch(torch.tensor([[3, 1]]), advantage=torch.tensor([2.0]))
        >>> out = uk.fused_loss(torch.zeros(1, 2, 4), batch, uk.ppo())
        >>> out.loss, out.metrics["clip_fraction"]
        (tensor(-2.), tensor(0.))
    """

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    _batch: Batch
    _loss: Loss

    @classmethod
    def of(cls, value: Tensor, stats: Iterable[Tensor], batch: Batch, loss: Loss) -> LossOutput:
        """From the statistics of each token, in any shape."""
        shape = batch.target.shape
        detached = [x.detach() if x.requires_grad else x for x in stats]
        logp, entropy, lse = [x if x.shape == shape else x.view(shape) for x in detached]
        return cls(value, logp, entropy, lse, batch, loss)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Means over valid tokens, sequences or pairs: 0-dim tensors, computed when read, without waiting for a device.

        Always: ``entropy``, and ``ratio_mean``, the mean of pi / pi_old (1 on policy). With ``ref_logp``: ``kl``, the
        estimate k3 of KL(pi || pi_ref). Objectives add more, such as ``clip_fraction``; theirs replaces one of these if
        the name is the same. If two objectives of a sum add the same name, the later one gets the number of its term:
        ``clip_fraction.1``.
        """
        return {name: parts.mean for name, parts in self.metric_parts.items()}

    @property
    def metric_parts(self) -> dict[str, MetricParts]:
        """``metrics`` as sum, count, min and max, for one reduction across ranks."""
        with torch.no_grad():
            tokens = self._tokens()
            values: dict[str, Tensor | tuple[Tensor, Tensor]] = {"entropy": tokens.entropy}
            values["ratio_mean"] = ratio_to_old(tokens)
            if self._batch.ref_logp is not None:
                values["kl"] = kl_estimate(tokens)
            added: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
            for k, term in enumerate(self._loss.terms):
                for name, value in getattr(term.objective, "metrics", lambda t: {})(tokens).items():
                    added[f"{name}.{k}" if name in added else name] = value
            return {name: self._parts(value) for name, value in (values | added).items()}

    @property
    def terms(self) -> tuple[Tensor, ...]:
        """The value of each term of the loss, under its own weights: 0-dim, detached, computed when read."""
        with torch.no_grad():
            tokens, weights = self._tokens(), self._loss.weights(self._batch)
            return self._loss.values(tokens, weights)

    def _tokens(self) -> Tokens:
        return Tokens(self._batch, self.logp, self.entropy, self.lse)

    def _parts(self, metric: Tensor | tuple[Tensor, Tensor]) -> MetricParts:
        """Reduce a metric. Of values per token only valid tokens count; of values per sequence or pair all count."""
        value, chosen = metric if isinstance(metric, tuple) else (metric, None)
        value = value.to(self.logp.dtype)
        counted = self._batch.valid.reshape(-1)
        if value.shape != counted.shape:
            counted = torch.ones_like(value, dtype=torch.bool)
        if chosen is not None:
            counted = counted & chosen
        return MetricParts(
            torch.where(counted, value, 0).sum(),
            counted.sum().to(value.dtype),
            torch.where(counted, value, torch.inf).min() if value.numel() else value.new_tensor(torch.inf),
            torch.where(counted, value, -torch.inf).max() if value.numel() else value.new_tensor(-torch.inf),
        )


# DistributedDataParallel and other wrappers use this registry to find the tensors in a module's output.
register_pytree_node(
    LossOutput,
    lambda out: ([out.loss, out.logp, out.entropy, out.lse], (out._batch, out._loss)),
    lambda tensors, context: LossOutput(*tensors, *context),
)
