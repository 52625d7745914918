"""Which backend and kernel compute a loss, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Which backend and kernel run, and in how much memory. Values change only by rounding.

    Args:
        backend: ``cpu``, ``triton``, ``cuda`` or ``eager``; None: the first backend of the device that can run. If
            ``cuda`` is built, it takes the rows that ``split_row`` of ``triton`` would take, if they fit a cluster.
        kernel: one of the backend's kernels, or ``composed``: the statistics, then the objective as plain PyTorch under
            autograd, then the gradient. ``composed`` runs objectives that one-pass kernels cannot. None: the backend's
            default; ``composed`` for fp16 logits.
        overwrite_logits: write the gradient into the logits' memory: in the forward for a one-pass kernel, else in the
            backward, which may then run only once. The logits, and the tensor that they are a view of, become empty, so
            that nobody reads a gradient as logits: most functions raise on them, and their sum is 0. Other views and
            ``detach()`` aliases of that memory hold the gradient; so do the logits themselves under ``torch.compile``.
            Do not use them. Inside of selective activation checkpointing, which may keep the logits, one-pass kernels
            refuse it. Linear heads always overwrite the logits that they compute.
        max_chunk_bytes: for linear heads, memory for the logits of one chunk of tokens, bytes, > 0; at least one token
            must fit. None: 256 MiB on a CPU, 2.75 GiB on other devices.

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
        if not isinstance(self.max_chunk_bytes, int) or isinstance(self.max_chunk_bytes, bool):
            raise TypeError(f"max_chunk_bytes must be an int, got {self.max_chunk_bytes!r}")
        if self.max_chunk_bytes <= 0:
            raise ValueError(f"max_chunk_bytes must be positive, got {self.max_chunk_bytes}")
