"""A head whose parameters FSDP2 shards over processes."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launch import run_ranks
from tests.distributed.rank import WORLD


def test_sharded_parameters(tmp_path: Path) -> None:
    """Two processes with FSDP2: loss and gradients are those of one process; a sharded parameter itself is refused."""
    run_ranks("tests.distributed.rank", WORLD, tmp_path / "store")
