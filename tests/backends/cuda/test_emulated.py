"""The CUDA kernels on the CPU, by the emulator: right within budget, and the same bits in whatever order threads run."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.backends.cuda.emulated import READOUTS, Case, check, emulated, make_rows, memory, run
from tests.backends.cuda.emulator.build import load
from unirl_kernels.backends import cuda

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

VOCABULARIES = {
    F32: (1, 3, 4, 7, 1023, 1025, 4099, 10240, 10241, 20483, 50257, 147457),
    BF16: (1, 7, 8, 2049, 20481, 50257, 151936, 294913),
    F16: (15, 20483),
}
"""Below a vector, a vector, around the logits that all threads take at a time; the largest of a cluster of 1, and odd
ones of clusters of 2, 4, 8 and 16."""

LAYOUTS = ("contiguous", "aligned", "unaligned")

CASES = [
    *(Case(v, dtype, layout) for dtype, of in VOCABULARIES.items() for v in of for layout in ("aligned", "unaligned")),
    *(Case(v, dtype, "unaligned", in_place=True) for dtype, v in ((F32, 20483), (BF16, 20481), (F16, 7), (F32, 50257))),
    *(Case(v, F32, layout, d_dtype=BF16) for v in (3, 4, 4101, 20483) for layout in LAYOUTS),
    *(Case(v, d, readout=r) for r in READOUTS for v, d in ((1031, F32), (20483, BF16)) if r != "plain"),
    *(Case(v, d, objective="kl") for v, d in ((1031, F32), (20483, BF16))),
    *(Case(v, d, fill=f) for f in ("masked", "certain") for v, d in ((515, F32), (20483, F32), (20483, BF16))),
    Case(20483, F32, "unaligned", "softcap", in_place=True),
    Case(20483, F32, "unaligned", "softcap", d_dtype=BF16),
]

ORDERS = (("backward", 0), ("random", 1), ("random", 2))


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load("kernels")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case: Case, kernels: ModuleType) -> None:
    with emulated(kernels):
        kernels.schedule("forward")
        found = run(case)
        check(case, found)
        for order in ORDERS:
            kernels.schedule(*order)
            for name, x in run(case).items():
                assert torch.equal(x.nan_to_num(1e30), found[name].nan_to_num(1e30)), (name, order)
