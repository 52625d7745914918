"""The head of a language model as a matmul: its weight, its bias and its readout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import unirl_kernels as uk
from unirl_kernels.integrations.transformers import readout_of as configured_readout
from unirl_kernels.testing.oracle import apply_readout

PROBE_TOKENS = 16


class NotLinear(Exception):
    """A model's logits may not be a readout of hidden W^T + b; the message says why."""


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Logits are readout(hidden W^T + b).

    Args:
        weight: [V, D].
        bias: [V] or None.
        readout: what the model does to the logits; no temperature.
        dtype: of the matmuls' operands; bf16 through autocast.
    """

    weight: Tensor
    bias: Tensor | None
    readout: uk.Readout
    dtype: torch.dtype

    def loss(self, hidden: Tensor, batch: uk.Batch, loss: uk.Loss, plan: uk.Plan) -> uk.LossOutput:
        """The loss on hidden states, [S, L, D]. Logits exist only in chunks."""
        with self._autocast():
            return uk.fused_linear_loss(
                hidden, self.weight, batch, loss, bias=self.bias, readout=self.readout, plan=plan
            )

    def token_stats(self, hidden: Tensor, target: Tensor, plan: uk.Plan) -> uk.TokenStats:
        """Statistics of target tokens, [S, L]. Logits exist only in tiles."""
        with self._autocast():
            return uk.linear_token_stats(hidden, self.weight, target, bias=self.bias, readout=self.readout, plan=plan)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D], as the model itself computes them."""
        with self._autocast():
            return self.read_out(self.raw_logits(hidden))

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """hidden W^T + b."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return linear(hidden, self.weight, bias)

    def read_out(self, raw_logits: Tensor) -> Tensor:
        """Apply scale and softcap to raw logits."""
        softcap, scale = self.readout.softcap, self.readout.scale
        if softcap is None and scale == 1:
            return raw_logits  # nobody would pay for copies that change nothing
        return apply_readout(raw_logits, softcap=softcap, scale=scale)

    def with_weight(self, weight: Tensor) -> LinearHead:
        return replace(self, weight=weight)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.weight.device.type, self.dtype, enabled=self.dtype != torch.float32)


def head_of(network: Any, readout: uk.Readout, dtype: torch.dtype) -> LinearHead:
    """The head of transformers' model, for matmuls with operands of ``dtype``."""
    layer = network.get_output_embeddings()
    return LinearHead(layer.weight, getattr(layer, "bias", None), readout, dtype)


@torch.no_grad()
def readout_of(network: Any) -> uk.Readout:
    """The readout in a model's configuration, checked on a few tokens.

    Args:
        network: transformers' model, weights in fp32, in evaluation mode.

    Raises:
        NotLinear: when its logits do not come out.
    """
    layer = network.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise NotLinear("it names no output embeddings with a weight")
    vocab = min(len(layer.weight), len(network.get_input_embeddings().weight))
    ids = torch.arange(min(PROBE_TOKENS, vocab), device=layer.weight.device).unsqueeze(0)
    try:
        hidden = getattr(network.get_decoder()(input_ids=ids, use_cache=False), "last_hidden_state", None)
    except Exception as error:
        raise NotLinear(f"its decoder gives no hidden states by itself ({error})") from error
    if hidden is None or hidden.shape[-1] != layer.weight.shape[-1]:
        raise NotLinear("its decoder gives no hidden states that its output embeddings could multiply")
    logits = network(input_ids=ids, use_cache=False).logits
    readout = configured_readout(network.config)
    head = head_of(network, readout, torch.float32)
    # A sum of D products, in whatever order, errs by at most D units of rounding of the sum of their sizes.
    size = linear(hidden.abs(), layer.weight.abs()) + (0 if head.bias is None else head.bias.abs())
    rounding = hidden.shape[-1] * torch.finfo(torch.float32).eps * abs(readout.scale) * size
    if not bool(((head.logits(hidden) - logits).abs() <= rounding).all()):
        raise NotLinear(
            "its logits are not hidden states times output embeddings, with the scale and cap in its config"
        )
    return readout
