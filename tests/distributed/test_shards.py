"""Vocabularies and sequences that are split over processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_split_logits(world: int, tmp_path: Path) -> None:
    """Statistics and losses of every scope are those of the whole row; bytes; bad input; planted faults."""
    run_ranks("tests.distributed.shards", world, tmp_path / "store", str(world))
