"""How many tokens a GPU works on together: a pure function of sizes, for matmuls in whole waves of tiles."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

TILE = (128, 256)
"""Rows and columns of the result that a multiprocessor works on at a time in a matmul of cuBLAS, on Hopper."""

TOKENS_OF_CHUNK = (512, 1280)
"""Bounds of the tokens whose fp32 logits exist at a time: fewer are slower matmuls, more are memory for nothing."""

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


def sizes_of(shape: Shape) -> Sizes | None:
    """Chunks and groups where logits and their gradient have memory of their own; None where it is too little.

    As few groups as can be, and then the chunk that takes the fewest waves for a token.
    """
    step = TILE[0]
    most = min(shape.memory // LOGITS_SHARE // shape.logits, TOKENS_OF_CHUNK[1]) // step * step
    if most == 0:
        return None

    def kept(chunk: int) -> int:
        return (shape.memory - chunk * shape.logits) // shape.gradient // step * step

    def cost(chunk: int) -> tuple[int, float]:
        return -(-shape.tokens // kept(chunk)), waves(chunk, shape.vocab, shape.processors) / chunk

    chunk = min(range(most, min(most, TOKENS_OF_CHUNK[0]) - 1, -step), key=cost)
    return Sizes(chunk, _rows_of_group(shape, kept(chunk)))


def _rows_of_group(shape: Shape, most: int) -> int:
    """Tokens of a group: the groups are as few as can be, and make d_hidden, [tokens, D], in the fewest waves."""
    step, tokens = TILE[0], shape.tokens
    groups = -(-tokens // most)
    if groups <= 1:
        return most

    def total(rows: int) -> int:
        return sum(waves(min(rows, tokens - at), shape.d, shape.processors) for at in range(0, tokens, rows))

    return min(range(-(-tokens // (groups * step)) * step, most + 1, step), key=total)
