"""What is measured where the options leave it open."""

from __future__ import annotations

ROUNDS = {"cpu": 7, "cuda": 30}

SIZE = (4096, 151936)
"""Tokens and vocabulary."""

SWEPT_SIZE = {"cpu": (128, 32000), "cuda": (4096, 151936)}
"""In a sweep, each stays what it is here while the other changes."""
SWEPT_VOCABS = (1024, 4096, 16384, 49152, 151936, 262144)
SWEPT_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
