"""prime-rl's fused output layer on this package's kernels, with its name, signature and results.

prime-rl is in no package index. Its ``inject_prime_lm_head`` installs the output layer, and takes the class from its
module:

    from prime_rl.trainer.models.layers import lm_head
    from unirl_kernels.integrations.prime_rl import FusedOutputLinear

    lm_head.FusedOutputLinear = FusedOutputLinear           # before the model is set up
"""

from __future__ import annotations

import torch
from torch import Tensor

from unirl_kernels.api import linear_token_stats
from unirl_kernels.readout import Readout


class FusedOutputLinear(torch.nn.Linear):
    """log pi of each label, and H, from hidden states, without a tensor of all logits.

    Args:
        in_features: size of a hidden state, D.
        out_features: size of the vocabulary, V.
        chunk_size: size of prime-rl's chunks of tokens; not used, since the kernels choose their own.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> dict[str, Tensor]:
        """log pi of each label, and H.

        Args:
            hidden_states: [B, L, D].
            labels: [B, L] int64.
            temperature: [B, L], of each token's logits, > 0.

        Returns:
            ``logprobs`` and ``entropy``, [B, L] float32, differentiable; prime-rl's own entropy has no gradient.

        Raises:
            ValueError: when labels or temperatures are missing.
        """
        for name, value in (("labels", labels), ("temperature", temperature)):
            if value is None:
                raise ValueError(f"{name} must be given, one per token")
        assert labels is not None
        assert temperature is not None
        readout = Readout(temperature=temperature.reshape(labels.shape).float())
        stats = linear_token_stats(hidden_states, self.weight, labels, readout=readout)
        return {"logprobs": stats.logp, "entropy": stats.entropy}
