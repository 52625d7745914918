"""The parity gate of linear heads, from logits that exist in chunks only.

Everything is checked whole but for the gradient of a large weight: of that, the rows of all targets, and as many
others, spread over the whole tensor, as ``CHECKED_BYTES`` hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

import unirl_kernels as uk
from benchmarks.inputs import Inputs
from benchmarks.linear.inputs import chunks
from benchmarks.truth import EXACT, PLAIN, Check, Truth
from unirl_kernels.testing import oracle

CHECKED_BYTES = 2**26


class LinearTruth(Truth):
    """The truth about hidden states and weight. The budget of 16-bit operands is set by fp32 logits.

    Args:
        inputs: the work.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.hidden, self.weight = inputs.operands
        target = inputs.batch.target.flatten()
        logp, largest = {}, 1.0
        for dtype in (EXACT, PLAIN):
            of_positions = target.new_zeros(target.shape, dtype=dtype)
            for positions, logits in chunks(self.hidden, self.weight, dtype):
                index = target[positions].clamp(min=0)
                of_targets = oracle.log_probs(logits, index)
                lse = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) - of_targets
                largest = max(largest, lse.abs().max().item())
                of_positions[positions] = torch.where(target[positions] != uk.IGNORE, of_targets, 0)
            logp[dtype] = of_positions.view(inputs.batch.target.shape)
        super().__init__(inputs, logp, torch.arange(target.numel(), device=target.device), largest)
        vocab, d = self.weight.shape
        n = min(vocab, -(-CHECKED_BYTES // (8 * d)))
        spread = torch.linspace(0, vocab - 1, n, dtype=torch.float64, device=target.device)
        self.columns = torch.cat([spread.round().long(), inputs.index.flatten()]).unique()
        self._gradients: dict[bool, list[tuple[Tensor, Tensor]]] = {}

    @cached_property
    def entropy(self) -> dict[torch.dtype, Tensor]:
        used, found = self.checked_target != uk.IGNORE, {}
        for dtype in self.logp:
            parts = [oracle.entropy(logits) for _, logits in chunks(self.hidden, self.weight, dtype)]
            found[dtype] = torch.where(used, torch.cat(parts), 0)
        return found

    def check_gradients(self, check: Check, gradients: Sequence[Tensor], of_entropy: bool) -> None:
        if of_entropy not in self._gradients:
            arithmetic = [(EXACT, EXACT), (PLAIN, PLAIN)]
            if self.hidden.dtype != PLAIN:
                arithmetic.append((PLAIN, self.hidden.dtype))
            self._gradients[of_entropy] = [self._matmuls(of_entropy, *dtypes) for dtypes in arithmetic]
        gradients_of = self._gradients[of_entropy]
        d_hidden, d_weight = gradients[0].flatten(0, -2), gradients[1][self.columns]
        for i, (name, got) in enumerate((("d_hidden", d_hidden), ("d_weight", d_weight))):
            self.hold_gradient(check, name, got, *(both[i] for both in gradients_of))
        if bool(d_hidden[self.checked_target == uk.IGNORE].any()):
            check.problems.append("d_hidden: an ignored token is not zero")

    def _matmuls(self, of_entropy: bool, dtype: torch.dtype, factors: torch.dtype) -> tuple[Tensor, Tensor]:
        """[T, D] and [columns, D]: gradients of hidden states and of the checked rows of the weight.

        Args:
            of_entropy: as for ``check_gradients``.
            dtype: of the sums.
            factors: of what is multiplied; 16-bit ones as such, as on a GPU, or widened.
        """
        rows, weight = self.hidden.flatten(0, 1), self.weight.to(dtype)
        d_hidden, d_weight = torch.zeros_like(rows, dtype=dtype), torch.zeros_like(weight[self.columns])
        for positions, logits in chunks(self.hidden, weight, dtype):
            d_logits = self.d_logits(logits, positions, of_entropy).to(factors).to(dtype)
            d_hidden[positions] = d_logits @ weight
            d_weight.addmm_(d_logits[:, self.columns].t(), rows[positions].to(dtype))
        return d_hidden, d_weight
