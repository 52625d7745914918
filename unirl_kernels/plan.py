"""How the machine computes a loss; never what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Choices of the machine. They never change a value beyond rounding.

    Args:
        backend: ``cpu``, ``triton``, ``cuda`` or ``eager``; None takes the best that runs on the logits' device.
        kernel: the backend's kernel, or ``composed`` (statistics, then the objective under autograd, then the
            gradient: runs any objective); None takes the default of the backend, for fp16 logits ``composed``.
        overwrite_logits: put the gradient into the logits' memory, in the forward where the kernel has one pass, else
            in the backward. The logits, and what they are a view of, are left without elements. Other views of the same
            memory, detached aliases, and under ``torch.compile`` the logits themselves, hold the gradient from then
            on: do not read them. Linear heads do so with their own logits in any case.
        max_chunk_bytes: linear heads' memory for the logits of one chunk of tokens, bytes, > 0; at least one token
            must fit. None: 256 MiB on a CPU, 2 GiB elsewhere.

    Raises:
        TypeError, ValueError: when ``max_chunk_bytes`` is not a positive integer, or ``overwrite_logits`` not a bool.
    """

    backend: str | None = None
    kernel: str | None = None
    overwrite_logits: bool = False
    max_chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.overwrite_logits, bool):
            raise TypeError(f"overwrite_logits must be True or False, got {self.overwrite_logits!r}")
        if self.max_chunk_bytes is None:
            return
        if not isinstance(self.max_chunk_bytes, int):
            raise TypeError(f"max_chunk_bytes must be an int, got {self.max_chunk_bytes!r}")
        if self.max_chunk_bytes <= 0:
            raise ValueError(f"max_chunk_bytes must be positive, got {self.max_chunk_bytes}")
