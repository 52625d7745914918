"""Copies of the same operand, used in turn, so that no call finds it in a cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

CACHE_BYTES_IF_UNKNOWN = 2**25
ALIGNMENT = 64
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Ring:
    """Equal copies of a tensor, together at least twice as large as the last-level cache, used in turn.

    Args:
        source: contiguous; the content of each copy. Not written.
        copies: how many, where no time is measured; None: as many as the cache asks for.
    """

    def __init__(self, source: Tensor, copies: int | None = None) -> None:
        self._source = source
        step = ALIGNMENT // source.element_size()
        size = -(-source.numel() // step) * step
        count = copies or max(2, -(-2 * last_level_cache_bytes(source.device) // (size * source.element_size())))
        self._memory = torch.empty(count, size, dtype=source.dtype, device=source.device)
        self._memory[:, : source.numel()] = source.flatten()
        self._next = 0

    def __len__(self) -> int:
        """The number of copies."""
        return len(self._memory)

    def take(self) -> Tensor:
        """The copy that was used longest ago. It has its own version counter, so that for autograd a write to another
        copy is not a write to this one."""
        copy = self._memory.data[self._next, : self._source.numel()]
        self._next = (self._next + 1) % len(self)
        return copy.view(self._source.shape)

    def restore(self, copy: Tensor) -> None:
        """Undo what was written into a copy."""
        copy.copy_(self._source)


@cache
def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache of ``device``, bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=CACHE_BYTES_IF_UNKNOWN)
