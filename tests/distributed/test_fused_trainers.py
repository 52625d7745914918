"""TRL's trainers under DDP, with and without ``fuse``: what is logged, and all parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")

from tests.distributed.fused_trainers import WORLD
from tests.distributed.launch import run_ranks


@pytest.mark.slow  # 40 s each: two processes, six runs
@pytest.mark.parametrize("name", ["grpo", "rloo", "dpo", "kto", "sft"])
def test_trains_as_without_it(name: str, tmp_path: Path) -> None:
    run_ranks("tests.distributed.fused_trainers", WORLD, tmp_path / "store", name)
