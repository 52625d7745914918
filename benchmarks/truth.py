"""The parity gate: what a provider computed, held against fp64 before its time counts.

The gradient's truth is equation (1) with the coefficients typed in, see ``oracle.coefficients``; nothing here is
shared with the kernels. The budget is that of ``testing.budgets``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.inputs import Inputs, Values
from benchmarks.work import FUSED
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, error, violations

EXACT, PLAIN = torch.float64, torch.float32
"""The truth, and eager PyTorch, whose error sets the budget."""


@dataclass
class Check:
    """The errors of a provider's results, and what exceeds the budget.

    Args:
        largest: largest absolute error by name of a result; NaN where it is no number.
        relative: relative L2 error, likewise.
        problems: what exceeds its budget, in words; empty when the provider is right.
    """

    largest: dict[str, float] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def hold(self, name: str, got: Tensor, truth: Tensor, condition: float, *plains: Tensor) -> None:
        """Note the errors of a result, and what of them exceeds the budget that each of the plain results sets."""
        of_each = [violations(got, plain, truth, condition=condition) for plain in plains]
        self.problems += [f"{name}: {text}" for text in min(of_each, key=len)]
        try:
            reached = error(got, truth)
        except ValueError:
            self.largest[name] = self.relative[name] = math.nan
        else:
            self.largest[name], self.relative[name] = reached.largest, reached.relative


class Truth(ABC):
    """The results of fp64 arithmetic, and of eager fp32 PyTorch.

    Args:
        inputs: the work.
        logp: [B, L], log-probabilities by dtype.
        rows: [n], the flat positions whose entropy and gradient are checked.
        lse: size of what a log-probability is computed from, at least 1.
    """

    def __init__(self, inputs: Inputs, logp: Mapping[torch.dtype, Tensor], rows: Tensor, lse: float) -> None:
        self.inputs, self.logp, self.rows, self.lse = inputs, logp, rows, lse
        self.checked_target = inputs.batch.target.flatten()[rows]

    @property
    @abstractmethod
    def entropy(self) -> Mapping[torch.dtype, Tensor]:
        """[n] by dtype, of the checked rows; 0 where they are ignored."""

    @abstractmethod
    def check_gradients(self, check: Check, gradients: Sequence[Tensor], of_entropy: bool) -> None:
        """Hold the gradients of the operands against their truth.

        Args:
            check: where to note what comes out.
            gradients: as the provider returned them.
            of_entropy: the upstream gradient of entropy went into them.
        """

    def check(self, values: Values, gradients: Sequence[Tensor]) -> Check:
        """Compare with the truth. The arguments are the provider's results."""
        check = Check()
        if values.logp is not None:
            exact, plain = self.logp[EXACT], self.logp[PLAIN]
            logp = torch.where(self.inputs.used, values.logp.detach(), 0)
            check.hold("logp", logp, exact, condition_of(exact, self.lse), plain)
        if values.entropy is not None:
            exact, plain = self.entropy[EXACT], self.entropy[PLAIN]
            got = torch.where(self.checked_target != uk.IGNORE, values.entropy.detach().flatten()[self.rows], 0)
            check.hold("entropy", got, exact, condition_of(exact, self.lse), plain)
        if values.loss is not None:
            exact, plain = (self.loss[d].view(1) for d in (EXACT, PLAIN))
            check.hold("loss", values.loss.detach().view(1), exact, self.lse * condition_of(exact), plain)
        if gradients:
            self.check_gradients(check, gradients, self.inputs.work.mode != FUSED and values.entropy is not None)
        return check

    def hold_gradient(self, check: Check, name: str, got: Tensor, exact: Tensor, *plains: Tensor) -> None:
        """Hold one gradient, of the dtype of the operands, against its truth."""
        # Rounded to that dtype, but an ulp is one of fp32: what is computed before that is not rounded.
        rounded = (plain.to(self.inputs.operands[0].dtype).float() for plain in plains)
        check.hold(name, got, exact, 2 * self.lse, *rounded)

    @cached_property
    def loss(self) -> dict[torch.dtype, Tensor]:
        """The loss of the whole batch: that of two columns of which the target has the probability it has here."""
        if self.inputs.work.own:
            return {dtype: self.inputs.loss(logp).detach() for dtype, logp in self.logp.items()}
        algorithm, target = self.inputs.work.loss, torch.where(self.inputs.used, 0, uk.IGNORE)
        losses = {}
        for dtype, logp in self.logp.items():
            others = torch.log(-torch.expm1(logp.clamp(max=-torch.finfo(dtype).tiny)))
            batch = self.inputs.batch
            two = uk.Batch(target, batch.advantage, batch.old_logp, batch.ref_logp)
            losses[dtype] = oracle.loss(algorithm, torch.stack([logp, others], -1), two)
        return losses

    def d_logits(self, logits: Tensor, rows: Tensor | slice, of_entropy: bool) -> Tensor:
        """[n, V]: gradient of the logits of some positions; in the modes of statistics from the upstream gradient of
        the log-probabilities and, where ``of_entropy``, of the entropy.

        Args:
            logits: [n, V], of a dtype in ``logp``.
            rows: which positions, flat.
            of_entropy: as for ``check_gradients``.
        """
        leaf, target = logits.detach().requires_grad_(), self.inputs.batch.target.flatten()[rows]
        value = (oracle.log_probs(leaf, target) * self._d_logp(logits.dtype)[rows]).sum()
        if of_entropy:
            d_entropy = self.inputs.d_entropy.flatten()[rows].to(logits.dtype)
            value = value + (oracle.entropy(leaf) * torch.where(target != uk.IGNORE, d_entropy, 0)).sum()
        return torch.autograd.grad(value, leaf)[0]

    def _d_logp(self, dtype: torch.dtype) -> Tensor:
        """[T]: gradient of the loss, or the upstream one, with respect to the log-probabilities."""
        inputs = self.inputs
        if inputs.work.mode != FUSED:
            return inputs.d_logp.flatten().to(dtype)
        if inputs.work.own:
            leaf = self.logp[dtype].detach().requires_grad_()
            return torch.autograd.grad(inputs.loss(leaf), leaf)[0].flatten()
        gc = oracle.coefficients(inputs.work.loss, self.logp[dtype], inputs.batch)
        units = inputs.batch.n_sequences // (2 if inputs.work.loss == "dpo" else 1)
        length = inputs.batch.per_token(inputs.batch.lengths).flatten()
        return -gc / (units * length.clamp(min=1))
