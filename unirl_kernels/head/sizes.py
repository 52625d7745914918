"""How many tokens a GPU works on together: a pure function of sizes, for matmuls in whole waves of tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

TILE = (128, 256)
"""Rows and columns of the result that a multiprocessor works on at a time in a matmul of cuBLAS, on Hopper."""

TOKENS_OF_CHUNK = (512, 1280)
"""Bounds of the tokens whose fp32 logits exist at a time: fewer are slower matmuls, more are memory for nothing."""

MULTIPLICATIONS_PER_BYTE = 100
"""Of all multiprocessors while a byte crosses the memory: 84 on an H200, 120 on an H100."""

MOST_GROUPS_MORE = 2
"""So many times as many groups as the memory asks for are tried."""

LOGITS_SHARE = 3
"""The part of the memory that fp32 logits take at most is one in so many; gradients take the rest."""


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def waves(rows: int, columns: int, processors: int) -> int:
    """How often all multiprocessors work on a tile until a result of rows x columns is there."""
    tiles = -(-rows // TILE[0]) * -(-columns // TILE[1])
    return -(-tiles // processors)


class Shape(NamedTuple):
    """What the sizes of chunks depend on."""

    tokens: int
    vocab: int
    d: int
    logits: int  # bytes of those of a token
    gradient: int  # bytes of theirs
    memory: int  # bytes for both
    processors: int  # multiprocessors of the device


class Sizes(NamedTuple):
    """Tokens that are worked on together."""

    chunk: int  # whose logits exist at a time
    group: int  # whose gradients do: what the other matmuls are made of


@lru_cache
def sizes_of(shape: Shape) -> Sizes | None:
    """Chunks and groups where logits and their gradient have memory of their own, those that are predicted to take the
    least time; None where the memory is too little."""
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
    """What depends on the sizes: multiplications of a multiprocessor, and as many as it could do meanwhile where fp32
    sums of d_weight cross the memory."""
    groups = -(-shape.tokens // sizes.group)
    passes = 0 if groups <= 1 else 2 * groups - 1  # all groups write, all but the first read
    per_pass = 4 * shape.vocab * shape.d * MULTIPLICATIONS_PER_BYTE / shape.processors
    return _over(shape.tokens, sizes.group, lambda rows: _matmuls(shape, rows, sizes.chunk)) + passes * per_pass


def _matmuls(shape: Shape, rows: int, chunk: int) -> float:
    """Multiplications of a multiprocessor for a group's logits and d_hidden. Those of d_weight are the same whatever
    the sizes are: its result is many waves."""
    logits = _over(rows, chunk, lambda part: waves(part, shape.vocab, shape.processors)) * shape.d
    return TILE[0] * TILE[1] * (logits + waves(rows, shape.d, shape.processors) * shape.vocab)


def _over(n: int, part: int, cost: Callable[[int], float]) -> float:
    """The cost of n tokens in parts of which the last one may be smaller."""
    return n // part * cost(part) + (cost(n % part) if n % part else 0)
