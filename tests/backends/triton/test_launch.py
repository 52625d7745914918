"""Where rows lie, how they are split, what is launched: layouts, addresses, slices, scale, availability."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.backends.triton.rows import (
    BACKEND,
    DEVICE,
    OBJECTIVES,
    PLAIN,
    READOUTS,
    RESULTS,
    Rows,
    check,
    make_rows,
    run,
)
from unirl_kernels.backends.groups import RowMoments
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.split_row import number, publish
from unirl_kernels.backends.triton.tiles import head_and_body
from unirl_kernels.batch import IGNORE

KERNELS = pytest.mark.parametrize("kernel", BACKEND.KERNELS)


@KERNELS
@pytest.mark.parametrize(("vocab", "objective"), [(264, "kl"), (264, "entropy"), (261, "kl")])
def test_layouts_give_the_same_bits(vocab: int, objective: str, kernel: str) -> None:
    """Strided, sliced, misaligned, in place, alone or again: a row is a row."""
    rows = make_rows(vocab, torch.bfloat16, (2, 2))
    expected = run(rows, kernel, objective)
    beside = {
        "sliced": torch.full((2, 3, vocab), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, :-1],
        "misaligned": torch.full((2, 4, vocab + 3), torch.nan, dtype=torch.bfloat16, device=DEVICE)[:, 1:3, 1:-2],
        "transposed": torch.zeros(2, 2, vocab, dtype=torch.bfloat16, device=DEVICE).transpose(0, 1),
    }
    for name, x in beside.items():
        x.copy_(rows.logits)
        before = x._base.clone()
        strided = Rows(x, rows.target, rows.fields)
        for d_logits in (None, x):
            for a, b in zip(expected, run(strided, kernel, objective, d_logits=d_logits), strict=True):
                assert torch.equal(a, b), name
        x.copy_(rows.logits)
        assert torch.equal(x._base.view(torch.int16), before.view(torch.int16)), f"wrote beside the {name} rows"
    alone = Rows(rows.logits[1:, 1:], rows.target[1:, 1:], {k: f[1:, 1:] for k, f in rows.fields.items()})
    for a, b in zip(expected, run(alone, kernel, objective), strict=True):
        assert torch.equal(a[1:, 1:], b)


@KERNELS
def test_rows_more_than_2_31_elements_apart(kernel: str) -> None:
    """Address arithmetic in 64 bits. Memory that is not touched is never committed."""
    stride = 2**31 + 8
    far = torch.empty(stride + 160, dtype=torch.bfloat16, device=DEVICE)
    rows = make_rows(160, torch.bfloat16)
    expected = run(rows, kernel)
    logp = BACKEND.token_stats(rows.logits, rows.target, PLAIN).stats.logp
    for shape, strides in (((1, 2, 160), (8, stride, 1)), ((2, 1, 160), (stride, 8, 1))):
        x = far.as_strided(shape, strides)
        x.copy_(rows.logits.view(shape))
        view = Rows(x, rows.target.view(shape[:2]), {k: f.view(shape[:2]) for k, f in rows.fields.items()})
        assert torch.equal(BACKEND.token_stats(x, view.target, PLAIN).stats.logp.flatten(), logp.flatten())
        for a, b in zip(expected, run(view, kernel, d_logits=x), strict=True):
            assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("vocab", "readout"), [(5120, "plain"), (5003, "plain"), (5120, "softcap")])
def test_split_rows(vocab: int, readout: str, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a row. The interpreter runs programs one after another, so nobody may wait: a first run over records
    that are marked publishes the true ones beneath the marks, and the run that counts finds them there."""
    from unirl_kernels.backends.triton import launch

    args = READOUTS[readout]
    mark = torch.tensor(-(2**63), device=DEVICE)
    scratch: list[Tensor] = []

    def marked(records: int, device: torch.device) -> Tensor:
        if not scratch:
            scratch.append(torch.zeros(1 + records, launch.RECORD.value, dtype=torch.int64, device=device))
            scratch[0][1:] = mark
        return scratch[0]

    monkeypatch.setattr(launch, "_scratch", marked)
    monkeypatch.setattr(geometry, "device_of", lambda device: geometry.Device(5, (0, 0), False))
    monkeypatch.setattr(geometry, "whole_row", lambda shape, vocab: shape)
    monkeypatch.setattr(geometry, "SIZES", geometry.SIZES._replace(split_max_warps=1))
    rows = make_rows(vocab, shape=(1, 3))
    rows.logits[0, 1, :3000] = -torch.inf
    rows.target[0, 1] = 4999
    rows.target[0, 2] = IGNORE
    run(rows, "split_row", objective, args)
    assert len(scratch[0]) == 1 + 3 * -(-vocab // (1024 if args.softcap else 2048)), "the row was not split"
    scratch[0] &= ~mark
    scratch[0][0] = 0
    split = run(rows, "split_row", objective, args)
    whole = run(rows, "two_sweep", objective, args)
    exact = run(Rows(rows.logits.double(), rows.target, rows.fields), "two_sweep", objective, args)
    for name, a, b, c in zip(RESULTS, split, whole, exact, strict=True):
        check(a, b, c, name, 10.0)
    d_logits = split[-1]
    assert not d_logits[0, 2].any()
    if args.softcap is None:
        assert not d_logits[0, 1, :3000].any()


@pytest.mark.parametrize(
    ("dtype", "vocab", "readout", "registers", "needed"),
    [
        (torch.bfloat16, 262144, "linear", 128, 8),
        (torch.bfloat16, 262144, "softcap", 128, 16),
        (torch.float32, 262144, "linear", 232, 16),
        (torch.float64, 128256, "linear", 168, 42),
        (torch.bfloat16, 262144, "linear", None, 32),
    ],
)
def test_split_rows_fit_on_the_device(
    dtype: torch.dtype, vocab: int, readout: str, registers: int | None, needed: int
) -> None:
    """Slices wait for one another: if one of them cannot start, none ends."""
    shape = geometry.slice_tile(dtype, vocab, readout)
    assert geometry.programs(shape, vocab, needed, registers) == 4 * needed
    certain = geometry.certain_programs(shape, registers)
    assert geometry.programs(shape, vocab, needed, registers, cooperative=True) == certain * needed
    reason = rf"split_row.*rows of {vocab} logits.*on each of {needed - 1} multiprocessors.*Plan\(kernel='two_sweep'\)"
    with pytest.raises(RuntimeError, match=reason):
        geometry.programs(shape, vocab, needed - 1, registers)


@triton.jit
def published(x: tl.tensor, record: tl.tensor, out: tl.tensor) -> None:
    value = tl.load(x)
    publish(record, RowMoments(value, value, value, value))
    tl.debug_barrier()
    tl.store(out, number(tl.load(record), value.dtype))


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float64, torch.int64), (torch.float32, torch.int32)], ids=lambda x: str(x)
)
def test_no_number_is_published_as_nothing(dtype: torch.dtype, bits: torch.dtype) -> None:
    """An entry of 0 is waited for, for ever: neither 0 nor -0 nor a NaN of any bits may be one."""
    largest = torch.iinfo(bits).max
    for number_bits in (0, -largest - 1, 1, largest, -1, -2):
        x = torch.tensor(number_bits, dtype=bits, device=DEVICE).view(dtype)
        record, out = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.empty((), dtype=dtype, device=DEVICE)
        published[(1,)](x, record, out)
        assert record.all()
        assert torch.equal(out.view(bits), x.view(bits)) or (out.isnan() and x.isnan())


@triton.jit
def parts(x: tl.tensor, size: tl.tensor, out: tl.tensor, TILE: tl.constexpr) -> None:
    head, body = head_and_body(x, size, TILE)
    tl.store(out, head)
    tl.store(out + 1, body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bodies_are_aligned(dtype: torch.dtype) -> None:
    """The interpreter stores vectors anywhere; a GPU does not."""
    vector = 16 // dtype.itemsize
    memory = torch.empty(200, dtype=dtype, device=DEVICE)
    for start in range(2 * vector):
        for size in (1, vector - 1, vector, 50):
            out = torch.empty(2, dtype=torch.int32, device=DEVICE)
            parts[(1,)](memory[start:], size, out, geometry.Tile(1, 32, vector, 1, aligned=False))
            head, body = out.tolist()
            assert 0 <= head <= min(size, vector - 1)
            assert body % vector == 0
            assert size - vector < head + body <= size
            assert body == 0 or memory[start + head :].data_ptr() % 16 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_slices_cover_a_row(dtype: torch.dtype) -> None:
    for vocab in [*range(1, 4000, 7), 32000, 49152, 50257, 128256, 151936, 201088, 262144, 262208, 10**6 + 1]:
        for readout in ("linear", "softcap"):
            split = geometry.split(geometry.slice_tile(dtype, vocab, readout), vocab)
            width = -(-vocab // (split.slices * split.tile.vector)) * split.tile.vector  # as ``split_row`` has it
            assert width <= split.tile.columns
            assert (split.slices - 1) * width < vocab <= split.slices * width
            assert split.slices <= split.padded == triton.next_power_of_2(split.padded)
            assert split.padded * geometry.RECORD >= split.tile.lanes, "threads would share an entry"
            assert 2 * split.half.columns == split.tile.columns


@pytest.mark.parametrize("factor", [1.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale(dtype: torch.dtype, factor: float) -> None:
    base = torch.randn(2, 4, 605, device=DEVICE).to(dtype)
    k = torch.tensor(factor, device=DEVICE)
    for view in (base, base[:, 1:3], base[..., 1:-2], base[0], base[0, 0]):
        x = base.clone().as_strided(view.shape, view.stride(), view.storage_offset())
        outside = x._base.clone().as_strided(view.shape, view.stride(), view.storage_offset())
        expected = x.to(torch.float64) * factor
        BACKEND.scale_(x, k)
        assert torch.equal(x, expected.to(dtype))
        x.copy_(outside)
        assert torch.equal(x._base, base), "wrote beside the rows"


PROBE = """
import torch
from unirl_kernels.backends import load
backend = load("triton")
import sys
print("triton" in sys.modules)
print(backend.unavailable(torch.device("cpu")))
"""


def test_unavailable_without_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=True)
    imported, reason = done.stdout.splitlines()
    assert imported == "False", "importing the backend imported Triton"
    assert "TRITON_INTERPRET=1" in reason
