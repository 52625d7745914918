"""The CUDA kernels on the CPU, by the emulator: within budget, and with the same bits in whatever order threads run.

Of every case there are rows with a target in the first and in the last column, an ignored one, and one whose target is
no position of the vocabulary; statistics, their gradients and a loss are held to fp64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.backends.cuda.emulated import READOUTS, Case, check, emulated, memory, only_rows_written, run, stats_of
from tests.backends.cuda.emulator.build import load
from unirl_kernels.backends import cuda

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

VOCABULARIES = {F32: (1, 3, 4, 7, 1023, 1025, 10240, 10241, 20483), BF16: (1, 7, 8, 2049, 20481), F16: (15, 20483)}
"""Around a vector, around what all threads take at a time, the largest row of one block, clusters of 2 and of 4."""

LAYOUTS = ("aligned", "unaligned")

LARGE = [
    Case(50257, F32, "unaligned"),  # 8 blocks
    Case(152001, F32, "unaligned"),  # 16
    Case(50257, BF16, "unaligned"),  # 4
    Case(151936, BF16, "aligned"),  # 8
    Case(304001, BF16, "unaligned", "softcap"),  # 16
]

CASES = [
    *(Case(v, dtype, layout) for dtype, of in VOCABULARIES.items() for v in of for layout in LAYOUTS),
    *(Case(v, d, layout, in_place=True) for v, d in ((20483, F32), (20481, BF16)) for layout in LAYOUTS),
    *(Case(v, d, "unaligned", in_place=True) for v, d in ((7, F16), (50257, F32))),
    *(Case(v, F32, layout, d_dtype=BF16) for v in (3, 4, 4101, 20483) for layout in LAYOUTS),
    *(Case(v, d, readout=r) for r in READOUTS for v, d in ((1031, F32), (20483, BF16)) if r != "plain"),
    *(Case(v, d, objective="policy") for v, d in ((1031, F32), (20483, BF16))),
    *(Case(v, d, fill=f) for f in ("masked", "certain") for v, d in ((515, F32), (20483, F32), (20483, BF16))),
    Case(20483, F32, "unaligned", "softcap", in_place=True),
    Case(20483, F32, "unaligned", "softcap", d_dtype=BF16),
    *LARGE,
]

ORDERS = (("backward", 0), ("random", 1), ("random", 2))
"""Besides forward."""


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    module = load("kernels")
    module.schedule("forward")
    with emulated(module):
        yield module


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case: Case, kernels: ModuleType) -> None:
    found = run(case)
    check(case, found)
    for order in ORDERS:
        kernels.schedule(*order)
        for name, x in run(case).items():
            assert torch.equal(bits(x), bits(found[name])), f"{name} has other bits in the order {order}"


@pytest.mark.parametrize(("vocab", "dtype"), [(7, F16), (1025, BF16), (10241, F32), (20483, BF16)], ids=str)
def test_bits_do_not_depend_on_the_layout(vocab: int, dtype: torch.dtype, kernels: ModuleType) -> None:
    first = run(Case(vocab, dtype, "aligned"))
    for case in (Case(vocab, dtype, "unaligned"), Case(vocab, dtype, "unaligned", in_place=True)):
        for name, x in run(case).items():
            assert torch.equal(bits(x), bits(first[name])), name


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (F32, {10240: 1, 10241: 2, 20483: 4, 50257: 8, 152001: 16}),
        (BF16, {2049: 1, 20481: 2, 50257: 4, 151936: 8, 304001: 16}),
    ],
    ids=str,
)
def test_cluster_sizes(dtype: torch.dtype, sizes: dict[int, int], kernels: ModuleType) -> None:
    """Those of the cases: every size is among them, in 16 and in 32 bits."""
    for vocab, size in sizes.items():
        assert any((case.vocab, case.dtype) == (vocab, dtype) for case in CASES)
        stats_of(torch.zeros(1, 1, vocab, dtype=dtype), 0)
        assert kernels.cluster() == size, vocab


@pytest.mark.parametrize("vocab", [515, 10241, 20483, 50257, 152001])
def test_certain_target_keeps_its_relative_accuracy(vocab: int, kernels: ModuleType) -> None:
    """1 - p_y is two units of fp32 beside 1; what the maximum's own thread sums beside that 1 is lost, but no more."""
    logits = torch.randn(1, 1, vocab)
    logits[0, 0, vocab // 3] = 16 + math.log(vocab)
    exact = torch.log_softmax(logits.double(), -1)[0, 0, vocab // 3].item()
    assert -1e-6 < exact < -1e-8
    logp = stats_of(logits, vocab // 3).logp.item()
    assert abs(logp / exact - 1) < 1 / 64


@pytest.mark.parametrize("factor", [1.0, -0.37])
@pytest.mark.parametrize("layout", ["aligned", "unaligned"])
@pytest.mark.parametrize(("vocab", "dtype"), [(3, F32), (1031, F32), (2049, BF16), (77, F16)], ids=str)
def test_scale(vocab: int, dtype: torch.dtype, layout: str, factor: float, kernels: ModuleType) -> None:
    x = memory(Case(vocab, dtype, layout), dtype)
    x.copy_(torch.randn(x.shape))
    expected = (x.float() * torch.tensor(factor)).to(dtype)
    cuda.scale_(x, torch.tensor(factor))
    assert torch.equal(x, expected)
    assert only_rows_written(x)


def test_a_device_that_runs_no_large_cluster(kernels: ModuleType) -> None:
    """It is asked first: the launch would fail. Nor is an error left behind for torch to find at its next check."""
    logits = torch.zeros(1, 1, 304001, dtype=BF16)
    kernels.run_at_once(8)
    try:
        with pytest.raises(RuntimeError, match=r"needs 16 blocks at once for rows of 304001 logits.*backend='triton'"):
            stats_of(logits, 0)
        assert not kernels.error_is_left()
        stats_of(logits[..., :1031], 0)
    finally:
        kernels.run_at_once(16)
    stats_of(logits, 0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_longest_row(dtype: torch.dtype, kernels: ModuleType) -> None:
    """The shared memory of 16 blocks holds it; a longer one is refused with its length."""
    with pytest.raises(RuntimeError, match="V <= ") as refused:
        stats_of(torch.empty(1, 1, 3_000_000, dtype=dtype), 0)
    longest = int(re.findall(r"V <= (\d+)", str(refused.value))[0])
    with pytest.raises(RuntimeError, match=f"V <= {longest}, got {longest + 1}"):
        stats_of(torch.empty(1, 1, longest + 1, dtype=dtype), 0)
    stats = stats_of(torch.zeros(1, 1, longest, dtype=dtype), 0)
    for value, exact in zip(stats, (-math.log(longest), math.log(longest), math.log(longest)), strict=True):
        assert value.item() == torch.tensor(exact, dtype=torch.float32).item()
