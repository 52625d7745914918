"""The parity gate of logits.

Log-probabilities and the loss are checked whole, the gradient on rows spread over the whole tensor, so that a kernel
that goes wrong only where T V > 2^31 is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.inputs import Inputs
from benchmarks.logits.inputs import log_probs
from benchmarks.truth import EXACT, PLAIN, Check, Truth
from unirl_kernels.testing import oracle

CHECKED_BYTES = 2**26
LEAST_CHECKED_ROWS = 8


class LogitsTruth(Truth):
    """The truth about logits.

    Args:
        inputs: the work.
    """

    def __init__(self, inputs: Inputs) -> None:
        (logits,) = inputs.operands
        work, target = inputs.work, inputs.batch.target
        n = min(work.tokens, max(LEAST_CHECKED_ROWS, CHECKED_BYTES // (8 * work.vocab)))
        # Evenly spread, first and last (an ignored one) included.
        rows = torch.linspace(0, work.tokens - 1, n, device=target.device).round().long()
        self.checked_logits = logits.flatten(0, 1)[rows]
        lse = max(1.0, torch.logsumexp(self.checked_logits.double(), -1).abs().max().item())
        super().__init__(inputs, {d: log_probs(logits, target, d) for d in (EXACT, PLAIN)}, rows, lse)
        self._gradients: dict[bool, dict[torch.dtype, Tensor]] = {}

    @cached_property
    def entropy(self) -> dict[torch.dtype, Tensor]:
        used = self.checked_target != uk.IGNORE
        return {d: torch.where(used, oracle.entropy(self.checked_logits.to(d)), 0) for d in self.logp}

    def check_gradients(self, check: Check, gradients: Sequence[Tensor], of_entropy: bool) -> None:
        (gradient,) = gradients
        got = gradient.reshape(-1, self.inputs.work.vocab)[self.rows]
        by_dtype = self.gradient(of_entropy)
        self.hold_gradient(check, "gradient", got, by_dtype[EXACT], by_dtype[PLAIN])
        if bool(got[self.checked_target == uk.IGNORE].any()):
            check.problems.append("gradient: an ignored row is not zero")

    def gradient(self, of_entropy: bool) -> dict[torch.dtype, Tensor]:
        """[n, V] by dtype: gradient of the logits in the checked rows."""
        if of_entropy not in self._gradients:
            self._gradients[of_entropy] = {
                d: self.d_logits(self.checked_logits.to(d), self.rows, of_entropy) for d in self.logp
            }
        return self._gradients[of_entropy]
