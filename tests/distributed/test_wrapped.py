"""Modules in wrappers for data parallelism, which inspect their arguments and results."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launch import run_ranks
from tests.distributed.wrapped import WORLD


def test_gradients_are_the_mean_over_ranks(tmp_path: Path) -> None:
    """DistributedDataParallel, with a static graph too; FSDP2, with converted arguments too; a gathered weight."""
    run_ranks("tests.distributed.wrapped", WORLD, tmp_path / "store")
