"""How the machine computes a loss; never what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Which backend and kernel run, and in how much memory. No choice changes a value beyond rounding.

    Args:
        backend: ``cpu``, ``triton``, ``cuda`` or ``eager``; None takes the first of its device's backends that runs.
        kernel: the name of one of the backend's kernels, or ``composed``: the statistics, then the objective as plain
            PyTorch under autograd, then the gradient. ``composed`` runs what kernels cannot. None takes the backend's
            default; for fp16 logits ``composed``.
        overwrite_logits: write the gradient into the logits' memory, in the forward where a kernel has one pass, else
            in the backward, of which there may be one. The logits, and the tensor that they are a view of, are left
            empty, so that nobody reads a gradient for logits: most functions raise, a sum is 0. Do not use other views
            of that memory, aliases by ``detach()``, and under ``torch.compile`` the logits themselves: they hold the
            gradient from then on. Linear heads always do so with the logits that they compute.
        max_chunk_bytes: linear heads' memory for the logits of one chunk of tokens, bytes, > 0; at least one token
            must fit. None: 256 MiB on a CPU, 2.75 GiB elsewhere.

    Raises:
        TypeError: when ``max_chunk_bytes`` is not an int, or ``overwrite_logits`` not a bool.
        ValueError: when ``max_chunk_bytes`` is not positive.

    Examples:
        >>> logits, batch = torch.zeros(1, 2, 4), uk.Batch(torch.tensor([[3, 1]]))
        >>> uk.fused_loss(logits, batch, uk.sft(), plan=uk.Plan(backend="eager")).loss
        tensor(1.3863)
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
