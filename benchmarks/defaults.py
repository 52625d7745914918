"""Defaults of options."""

from __future__ import annotations

ROUNDS = {"cpu": 7, "cuda": 30}

SIZE = (4096, 151936)
"""Tokens and vocabulary."""

SWEPT_SIZE = {"cpu": (128, 32000), "cuda": (4096, 151936)}
"""Tokens and vocabulary of a sweep: one of them varies, and the other has this value."""
SWEPT_VOCABS = (1024, 4096, 16384, 49152, 151936, 262144)
SWEPT_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
