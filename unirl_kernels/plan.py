"""How the machine computes a loss; never what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Choices of the machine. They never change a value beyond rounding.

    Args:
        backend: ``cpu``, ``triton`` or ``eager``; None takes the best that runs on the logits' device.
        kernel: the backend's kernel, or ``composed`` (statistics, then the objective under autograd, then the
            gradient: runs any objective); None takes the default of the backend.
        overwrite_logits: put the gradient into the logits' memory. Using the logits afterwards raises.
        max_chunk_bytes: memory for the logits of one chunk in the linear heads, bytes, > 0.

    Raises:
        ValueError: when ``max_chunk_bytes`` is not positive.
    """

    backend: str | None = None
    kernel: str | None = None
    overwrite_logits: bool = False
    max_chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_chunk_bytes is not None and self.max_chunk_bytes <= 0:
            raise ValueError(f"max_chunk_bytes must be positive, got {self.max_chunk_bytes}")
