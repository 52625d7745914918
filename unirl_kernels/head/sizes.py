"""The number of tokens in chunks and groups on a GPU: a pure function of sizes, for whole waves of matmul tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

TILE = (128, 256)
"""Rows and columns of the tile that a multiprocessor computes at a time in a cuBLAS matmul on Hopper."""

TOKENS_OF_CHUNK = (512, 1280)
"""Bounds of the number of tokens in a chunk: fewer make matmuls slower, more only take memory."""

MULTIPLICATIONS_PER_BYTE = 100
"""Multiplications of a device in the time in which it moves a byte of memory: 84 on an H200, 120 on an H100."""

MOST_GROUPS_MORE = 2
"""Try up to this many times the number of groups that the memory requires."""

LOGITS_SHARE = 3
"""fp32 logits take at most 1 / LOGITS_SHARE of the memory; gradients take the rest."""


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def waves(rows: int, columns: int, processors: int) -> int:
    """The number of waves of tiles in a matmul with a result of rows x columns."""
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    return -(-tiles // processors)


class Shape(NamedTuple):
    """The inputs of ``sizes_of``."""

    tokens: int
    vocab: int
    d: int
    logits: int  # bytes of the logits of a token
    gradient: int  # bytes of their gradient
    memory: int  # bytes for both
    processors: int  # multiprocessors of the device


class Sizes(NamedTuple):
    """The number of tokens in a chunk and in a group."""

    chunk: int  # tokens whose logits exist at a time
    group: int  # tokens whose gradients exist at a time, for the two other matmuls


@lru_cache
def sizes_of(shape: Shape) -> Sizes | None:
    """The sizes with the least predicted time, if logits and their gradient have separate memory; None if the memory is
    too small."""
    step = TILE[0]
    most = min(shape.memory // LOGITS_SHARE // shape.logits, TOKENS_OF_CHUNK[1]) // step * step
    if most == 0:
        return None
    found = []
    for chunk in range(most, min(most, TOKENS_OF_CHUNK[0]) - 1, -step):
        kept = (shape.memory - chunk * shape.logits) // shape.gradient // step * step
        least = kept if kept >= shape.tokens else max(chunk, -(-kept // MOST_GROUPS_MORE // step) * step)
        found += [Sizes(chunk, group) for group in range(kept, least - 1, -step)]
    return min(found, key=lambda sizes: _work_of(shape, sizes))


def _work_of(shape: Shape, sizes: Sizes) -> float:
    """The part of the time that depends on the sizes, in multiplications of a multiprocessor: the matmuls, and the
    memory traffic of the fp32 sums of d_weight."""
    groups = -(-shape.tokens // sizes.group)
    passes = 0 if groups <= 1 else 2 * groups - 1  # all groups write, and all except the first read
    per_pass = 4 * shape.vocab * shape.d * MULTIPLICATIONS_PER_BYTE / shape.processors
    return _over(shape.tokens, sizes.group, lambda rows: _matmuls(shape, rows, sizes.chunk)) + passes * per_pass


def _matmuls(shape: Shape, rows: int, chunk: int) -> float:
    """Multiplications of a multiprocessor for a group's logits and d_hidden. Those of d_weight do not depend on the
    sizes, since its result has many waves."""
    logits = _over(rows, chunk, lambda part: waves(part, shape.vocab, shape.processors)) * shape.d
    return TILE[0] * TILE[1] * (logits + waves(rows, shape.d, shape.processors) * shape.vocab)


def _over(n: int, part: int, cost: Callable[[int], float]) -> float:
    """The cost of n tokens in parts; the last part may be smaller."""
    return n // part * cost(part) + (cost(n % part) if n % part else 0)
