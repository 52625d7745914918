"""The compile gate: kernels compiled for GPUs that are not here stay within the committed budgets.

Budgets hold for the Triton version that they were written with; another one must keep wide accesses and layout too, and
spill nothing. ``python -m tests.backends.triton.cubins --write`` writes them anew.
``UNIRL_COMPILE_GATE=full`` compiles every variant; by default bf16 stands for fp16, and aligned rows in bf16 stand for
the others where the architecture is not sm_90.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.backends.triton.cubins import BUDGETS, Variant, tile_of, variants

triton = pytest.importorskip("triton")

FULL = os.environ.get("UNIRL_COMPILE_GATE") == "full"
COMMITTED: dict[str, Any] = json.loads(BUDGETS.read_text())

SPILLED = {
    ("split_row-sm_90-bf16-vectors-entropy", "3.9"): 262,
    ("split_row-sm_90-bf16-odd-held128", "3.9"): 466,
}
"""Bytes, by variant and release of Triton; the release of the budgets spills nothing (``benchmarks/NOTES.md``)."""


def _stands_for_others(variant: Variant) -> bool:
    if variant.architecture == "sm_90":
        return variant.dtype in ("bf16", "fp32")
    return variant.dtype == "bf16" and variant.is_plain


VARIANTS = [v for v in variants() if FULL or _stands_for_others(v)]


def compiling(*args: str, **environment: str) -> str:
    """Output of ``tests.backends.triton.cubins`` in a process where Triton compiles instead of interpreting."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.triton.cubins", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads(compiling("--measure", *map(str, VARIANTS)))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_budget(variant: Variant, measured: dict[str, Any]) -> None:
    used, budget = measured[str(variant)], COMMITTED[str(variant)]
    # fp64 is for checks; a few scalars of its polynomials may spill.
    release = ".".join(triton.__version__.split(".")[:2])
    assert used["spilled"] <= SPILLED.get((str(variant), release), 32 if variant.dtype == "fp64" else 0)
    assert used["wide_loads"] > 0
    # A vector of four numbers in fp32 takes 8 bytes in bf16.
    assert used["wide_stores"] > 0 or variant.kernel in ("statistics", "observations") or variant.gradient
    if triton.__version__ == COMMITTED["triton"]:
        over = {name: (used[name], limit) for name, limit in budget.items() if used[name] > limit}
        assert not over, f"above the budget: {over} (used, allowed)"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_lane_per_thread(variant: Variant, measured: dict[str, Any]) -> None:
    """However a tile is accessed: otherwise sums take shuffles in every tile, and elements move between threads."""
    shape = tile_of(variant)
    lanes = shape.lanes // shape.num_warps
    held, accessed = [[1, 1, shape.vector], [1, lanes, 1]], [[[1, n], [1, lanes]] for n in (shape.vector, 2)]
    assert held in measured[str(variant)]["threads"]
    assert all(layout in (held, *accessed) for layout in measured[str(variant)]["threads"])


@pytest.mark.parametrize("sizes", ["", "split_max_warps=8", "held_elements=128 split_max_warps=2"])
def test_one_thread_polls_an_entry(sizes: str) -> None:
    """Two threads that poll the same entry may see different values, and which one a reduction takes is not defined."""
    slices = (1, 2, 4, 8, 9, 16, 17, 32, 33, 65)
    found = json.loads(compiling("--polls", *map(str, slices), UNIRL_GEOMETRY=sizes))
    for n, polled in zip(slices, found, strict=True):
        assert len(polled) == 3, "the records before and in the loop, and the number of tickets drawn"
        for shape, held in polled:
            assert all(a <= b for a, b in zip(held, shape, strict=True)), f"{n} slices: {held} for {shape}"


def test_every_budget_has_a_variant() -> None:
    assert set(COMMITTED) - {"triton"} == set(map(str, variants()))


@pytest.mark.parametrize("kernel", ["statistics", "observations", "two_sweep", "split_row"])
def test_sums_do_not_depend_on_where_a_row_lies(kernel: str, measured: dict[str, Any]) -> None:
    """Aligned and unaligned rows are summed by the same threads in the same order, or their bits would differ."""
    aligned, unaligned = (measured[str(Variant(kernel, "sm_90", "bf16", rows))]["sums"] for rows in ("vectors", "odd"))
    assert len(aligned) > 3
    assert aligned == unaligned


def test_one_kernel_for_all_batches() -> None:
    """No recompilation when tokens, lengths, strides, addresses or hyper-parameters change."""
    found = json.loads(compiling("--keys"))
    assert len(found) == 6
    for kernel, keys in found.items():
        assert len(keys) == 1, f"{kernel} would be compiled {len(keys)} times: {keys}"


def test_the_cache_on_disk_knows_a_generated_function(tmp_path: Path) -> None:
    variant = str(Variant("two_sweep", "sm_90", "fp32", "vectors"))
    compiling("--measure", variant, TRITON_CACHE_DIR=str(tmp_path))
    first = sorted(tmp_path.iterdir())
    compiling("--measure", variant, TRITON_CACHE_DIR=str(tmp_path))
    assert first
    assert sorted(tmp_path.iterdir()) == first
