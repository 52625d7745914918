"""How logits become a distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Readout:
    """Maps a model's raw logits x to those of the policy's distribution, z; log pi = log_softmax(z).

        z = softcap * tanh(scale * x / softcap) / temperature         (without softcap: z = scale * x / temperature)

    Under ``torch.compile`` a new temperature does not compile again. A new softcap or scale does.

    Args:
        temperature: sampling temperature, > 0; or a float32 or float64 tensor with one per token or per sequence.
        softcap: bound on |z| before temperature, > 0 (Gemma 2: 30); None for none.
        scale: factor on the raw logits, finite and not 0 (Cohere's ``logit_scale``).

    Raises:
        TypeError: when an argument has a wrong type or dtype.
        ValueError: when an argument is outside its range, or the temperature requires a gradient.

    Examples:
        A temperature divides the logits:

        >>> logits, target = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[1]])
        >>> uk.token_stats(logits, target, readout=uk.Readout(temperature=2.0)).logp
        tensor([[-0.3133]])
        >>> uk.token_stats(logits / 2, target).logp
        tensor([[-0.3133]])
    """

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, Tensor):
            if self.temperature.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"temperature must be a float32 or float64 tensor, got {self.temperature.dtype}")
            if self.temperature.requires_grad:
                raise ValueError("temperature must not require a gradient: detach it")
        elif not 0 < _number("temperature", self.temperature) < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if self.softcap is not None and not 0 < _number("softcap", self.softcap) < math.inf:
            raise ValueError(f"softcap must be positive and finite, got {self.softcap}")
        if not 0 < abs(_number("scale", self.scale)) < math.inf:
            raise ValueError(f"scale must be finite and not 0, got {self.scale}")


def _number(name: str, value: object) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)
