"""The parity gate: what a provider computed, held against fp64 before its time counts.

Log-probabilities and the loss are checked whole, the gradient on rows spread over the whole tensor, so that a kernel
that goes wrong only where T V > 2^31 is seen. The gradient's truth is equation (1) with the coefficients typed in, see
``reference.coefficients``; nothing here is shared with the kernels. The budget is that of ``accuracy``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import unirl_kernels as uk
from unirl_kernels import reference
from unirl_kernels.accuracy import condition_of, error, violations
from unirl_kernels.bench.work import FUSED, Inputs, Values, log_probs

CHECKED_BYTES = 2**26
LEAST_CHECKED_ROWS = 8


@dataclass
class Check:
    """What a provider's results are worth.

    Args:
        logp_error: largest absolute error, nats; None when it gives no log-probabilities.
        entropy_error: largest absolute error on the checked rows, nats.
        gradient_error: relative L2 on the checked rows.
        problems: what exceeds its budget, in words; empty when the provider is right.
    """

    logp_error: float | None = None
    entropy_error: float | None = None
    gradient_error: float | None = None
    problems: list[str] = field(default_factory=list)

    def hold(self, name: str, got: Tensor, plain: Tensor, truth: Tensor, condition: float) -> tuple[float, float]:
        """Note what exceeds the budget; the largest and the relative error, NaN where they are not numbers."""
        self.problems += [f"{name}: {text}" for text in violations(got, plain, truth, condition=condition)]
        try:
            reached = error(got, truth)
        except ValueError:
            return math.nan, math.nan
        return reached.largest, reached.relative


class Truth:
    """The results of fp64 arithmetic, and of eager fp32 PyTorch, whose error sets the budget.

    Args:
        inputs: the work.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.target = inputs.batch.target
        self.logp = {d: log_probs(inputs.logits, self.target, d) for d in (torch.float64, torch.float32)}
        row_bytes = 8 * inputs.work.vocab
        n = min(inputs.work.tokens, max(LEAST_CHECKED_ROWS, CHECKED_BYTES // row_bytes))
        # Evenly spread, first and last (an ignored one) included.
        self.rows = torch.linspace(0, inputs.work.tokens - 1, n, device=self.target.device).round().long()
        self.checked_logits = inputs.logits.flatten(0, 1)[self.rows]
        self.checked_target = self.target.flatten()[self.rows]
        self.lse = max(1.0, torch.logsumexp(self.checked_logits.double(), -1).abs().max().item())
        self._gradients: dict[tuple[bool, torch.dtype], Tensor] = {}

    def check(self, values: Values, gradient: Tensor | None) -> Check:
        """Compare with the truth. Arguments as the provider returned them."""
        check = Check()
        exact, plain = self.logp[torch.float64], self.logp[torch.float32]
        if values.logp is not None:
            logp = torch.where(self.inputs.used, values.logp.detach(), 0)
            check.logp_error, _ = check.hold("logp", logp, plain, exact, condition_of(exact, self.lse))
        if values.entropy is not None:
            got = torch.where(self.checked_target != uk.IGNORE, values.entropy.detach().flatten()[self.rows], 0)
            exact, plain = self.entropy[torch.float64], self.entropy[torch.float32]
            check.entropy_error, _ = check.hold("entropy", got, plain, exact, condition_of(exact, self.lse))
        if values.loss is not None:
            exact, plain = (self.loss[d].view(1) for d in (torch.float64, torch.float32))
            check.hold("loss", values.loss.detach().view(1), plain, exact, self.lse * condition_of(exact))
        if gradient is not None:
            self._check_gradient(check, gradient, values.entropy is not None)
        return check

    def _check_gradient(self, check: Check, gradient: Tensor, of_entropy: bool) -> None:
        got = gradient.reshape(-1, self.inputs.work.vocab)[self.rows]
        exact, plain = (self._gradient(of_entropy, d) for d in (torch.float64, torch.float32))
        # Rounded to the dtype of the logits, but an ulp is one of fp32: what is computed before that is not rounded.
        plain = plain.to(self.inputs.logits.dtype).float()
        _, check.gradient_error = check.hold("gradient", got, plain, exact, 2 * self.lse)
        if bool(got[self.checked_target == uk.IGNORE].any()):
            check.problems.append("gradient: an ignored row is not zero")

    @cached_property
    def loss(self) -> dict[torch.dtype, Tensor]:
        """The loss of the whole batch: that of two words of which the target has the probability it has here."""
        algorithm, target = self.inputs.work.loss, torch.where(self.inputs.used, 0, uk.IGNORE)
        losses = {}
        for dtype, logp in self.logp.items():
            others = torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(dtype).tiny)))
            batch = self.inputs.batch
            two = uk.Batch(target, batch.advantage, batch.old_logp, batch.ref_logp)
            losses[dtype] = reference.loss(algorithm, torch.stack([logp, others], -1), two)
        return losses

    @cached_property
    def entropy(self) -> dict[torch.dtype, Tensor]:
        """[n]: of the checked rows, 0 where they are ignored."""
        used = self.checked_target != uk.IGNORE
        return {d: torch.where(used, reference.entropy(self.checked_logits.to(d)), 0) for d in self.logp}

    def _gradient(self, of_entropy: bool, dtype: torch.dtype) -> Tensor:
        """[n, V]: gradient of the logits in the checked rows; in the modes of statistics from the upstream gradient
        of the log-probabilities, and of the entropy where the provider has one."""
        key = (of_entropy and self.inputs.work.mode != FUSED, dtype)
        if key not in self._gradients:
            leaf = self.checked_logits.to(dtype).requires_grad_()
            value = (reference.log_probs(leaf, self.checked_target) * self._d_logp(dtype)).sum()
            if key[0]:
                used = self.checked_target != uk.IGNORE
                d_entropy = self.inputs.d_entropy.flatten()[self.rows].to(dtype)
                value = value + (reference.entropy(leaf) * torch.where(used, d_entropy, 0)).sum()
            (self._gradients[key],) = torch.autograd.grad(value, leaf)
        return self._gradients[key]

    def _d_logp(self, dtype: torch.dtype) -> Tensor:
        """[n]: gradient of the loss, or the upstream one, with respect to the log-probability of the checked rows."""
        inputs = self.inputs
        if inputs.work.mode != FUSED:
            return inputs.d_logp.flatten()[self.rows].to(dtype)
        gc = reference.coefficients(inputs.work.loss, self.logp[dtype], inputs.batch)
        units = inputs.batch.n_sequences // (2 if inputs.work.loss == "dpo" else 1)
        length = inputs.batch.per_token(inputs.batch.lengths).flatten()
        return (-gc / (units * length.clamp(min=1)))[self.rows]
