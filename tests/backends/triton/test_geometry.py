"""Which kernel is taken without a name, and its sizes: by device, dtype and V alone. Devices here are made up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import unirl_kernels as uk
from tests import ROOT
from unirl_kernels import backends
from unirl_kernels.api.arguments import kernel_of
from unirl_kernels.backends import Choice, choices_by_vocab, cuda
from unirl_kernels.backends import triton as backend
from unirl_kernels.backends.triton import geometry
from unirl_kernels.backends.triton.geometry import ANY_VOCAB, Device
from unirl_kernels.commands import doctor
from unirl_kernels.explain import defaults

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
H100 = Device(132, (9, 0), True, 50 * 2**20)
H200 = Device(132, (9, 0), True, 60 * 2**20)
B200 = Device(148, (10, 0), True, 126 * 2**20)
A100 = Device(108, (8, 0), True, 40 * 2**20)
SLICE_OF_H100 = Device(16, (9, 0), True, 6 * 2**20)
MI300 = Device(304, (9, 4), False, 4 * 2**20)
CPU = Device(1, (0, 0), False)
DEVICES = [H100, H200, B200, A100, SLICE_OF_H100, MI300, CPU]


def kernel(device: Device, dtype: torch.dtype, vocab: int) -> str:
    return next(name for name, most in geometry.kernels_by_vocab(device, dtype) if vocab <= most)


@pytest.mark.parametrize(
    ("device", "dtype", "vocab", "expected"),
    [
        (H100, BF16, 9496, "two_sweep"),
        (H100, BF16, 24000, "two_sweep"),
        (H100, BF16, 32000, "split_row"),
        (H100, BF16, 151936, "split_row"),
        (H200, BF16, 262144, "split_row"),
        (H100, F32, 4096, "two_sweep"),
        (H100, F32, 151936, "split_row"),
        (B200, BF16, 50257, "two_sweep"),
        (B200, BF16, 151936, "split_row"),
        (A100, BF16, 128256, "split_row"),
        (SLICE_OF_H100, BF16, 151936, "split_row"),
        (SLICE_OF_H100, F32, 151936, "two_sweep"),  # its slices would not all run at once
        (H100, BF16, 10**7, "two_sweep"),  # likewise
        (MI300, BF16, 151936, "two_sweep"),
        (CPU, BF16, 151936, "two_sweep"),
    ],
)
def test_kernel(device: Device, dtype: torch.dtype, vocab: int, expected: str) -> None:
    assert kernel(device, dtype, vocab) == expected


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_row_has_a_kernel_that_runs(device: Device, dtype: torch.dtype) -> None:
    found = geometry.kernels_by_vocab(device, dtype)
    assert found[-1][1] == ANY_VOCAB
    for name, most in found:
        if name == "split_row" and most > 0:
            for readout in ("linear", "softcap"):
                for plain in (True, False):
                    registers = geometry.held_registers(dtype, device.capability, plain=plain)
                    shape = geometry.slice_tile(dtype, most, readout)
                    assert geometry.programs(shape, most, device.multiprocessors, registers)


@pytest.mark.parametrize(
    ("num_warps", "registers", "programs"),
    [
        (4, 128, 4),
        (4, 168, 3),
        (4, 232, 2),
        (2, 200, 4),  # 5 would fit the registers of the multiprocessor, but 3 warps fit no quarter of them
        (2, 168, 6),
        (1, 201, 8),  # as 208
        (8, 168, 1),
        (8, 128, 2),
        (4, 64, 4),  # as many as should be resident
    ],
)
def test_a_warp_has_its_registers_in_one_quarter(num_warps: int, registers: int, programs: int) -> None:
    shape = geometry.Tile(8, 32 * num_warps, 8, num_warps)
    assert geometry.certain_programs(shape, registers) == programs


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("device", [H100, B200], ids=str)
def test_rows_in_flight_fit_half_of_the_cache(device: Device, dtype: torch.dtype) -> None:
    """With their gradients; with fewer and wider programs where that is what makes them fit."""
    limit = geometry.kernels_by_vocab(device, dtype)[0][1]
    warps = set()
    for vocab in range(2048, limit, 128):
        num_warps = geometry.two_sweep_tile(device, dtype, vocab).num_warps
        rows = device.multiprocessors * (
            geometry.SWEEP_WARPS[dtype.itemsize] // max(num_warps, geometry.SIZES.max_warps)
        )
        assert rows * vocab * dtype.itemsize * 2 <= device.l2_bytes / 2
        warps.add(num_warps)
    assert warps >= {8, 16}
    assert geometry.two_sweep_tile(device, dtype, limit + 1) == geometry.tile(dtype, limit + 1)


def test_a_sweep_changes_sizes() -> None:
    code = "from unirl_kernels.backends.triton.geometry import SIZES as s; print(s.held_elements, s.split_max_warps)"
    environment = os.environ | {geometry.VARIABLE: "held_elements=128 split_max_warps=2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["128", "2"], done.stderr
    assert geometry.variant_of("") == geometry.Sizes()
    for wrong in ("held=1", "max_warps=two"):
        with pytest.raises(ValueError, match=f"UNIRL_GEOMETRY must be made of max_warps=N .*, got '{wrong}'"):
            geometry.variant_of(f"held_elements=128 {wrong}")


def test_explain_and_doctor_tell(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    told = (
        "triton two_sweep up to V = 24824, cuda cluster up to V = 304000, triton split_row up to V = 1622016, "
        "triton two_sweep beyond"
    )
    assert backends.told(choices_by_vocab(gpu, None, None, BF16)) == told
    assert backends.told(choices_by_vocab(torch.device("cpu"), "eager", None, F32)) == "eager rows"
    assert f"cuda  bf16    default: {told}" in defaults(gpu)
    assert ("cuda:0, bf16", told) in doctor._defaults(gpu)
    assert "default: cpu rows" in uk.explain(uk.grpo()).backends


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that the package takes for an H100; nothing runs there."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(geometry, "device_of", lambda device: H100)
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    backends._best.cache_clear()
    backends._by_vocab.cache_clear()
    yield device
    backends._best.cache_clear()
    backends._by_vocab.cache_clear()


@pytest.mark.parametrize("built", [False, True], ids=["triton alone", "with cuda"])
def test_choice(built: bool, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """``cluster`` in the place of ``split_row`` where it is built and holds the row; a name overrides."""
    monkeypatch.setattr(cuda, "unavailable", lambda device: None if built else "not built")

    def chosen(vocab: int, dtype: torch.dtype = BF16, plan: uk.Plan = uk.Plan(), loss: uk.Loss = uk.grpo()) -> Choice:
        return kernel_of(loss, plan, gpu, dtype, vocab)

    large = Choice("cuda", "cluster") if built else Choice("triton", "split_row")
    assert chosen(9496) == Choice("triton", "two_sweep")
    assert chosen(151936) == chosen(151936, F32) == large
    assert chosen(100_000, F64) == Choice("triton", "split_row")
    assert chosen(2_000_000, F32) == Choice("triton", "two_sweep")
    assert chosen(151936, loss=uk.dpo()) == Choice("triton", "composed")
    assert chosen(151936, plan=uk.Plan(kernel="two_sweep")) == Choice("triton", "two_sweep")
    assert chosen(151936, plan=uk.Plan(backend="triton")) == Choice("triton", "split_row")
    assert chosen(151936, plan=uk.Plan(kernel="composed")) == Choice("triton", "composed")
    if built:
        assert chosen(10**7, plan=uk.Plan(backend="cuda")) == Choice("cuda", "cluster")  # which says that it cannot


def test_longest_row_of_a_cluster_by_default() -> None:
    """As ``csrc/cuda/geometry.h`` has it."""
    text = (ROOT / "csrc/cuda/geometry.h").read_text()
    assert "FAIR_SLICE = SM_MEMORY / 3 - SYSTEM_MEMORY - OTHER_MEMORY;" in text
    size = {
        name: int(re.search(rf"{name} = (\d+)", text)[1]) for name in ("SM_MEMORY", "SYSTEM_MEMORY", "OTHER_MEMORY")
    }
    fair = (size["SM_MEMORY"] << 10) // 3 - (size["SYSTEM_MEMORY"] << 10) - size["OTHER_MEMORY"]
    assert 8 * fair == cuda.BYTES_BY_DEFAULT


def test_compiled_for_any_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice by V is a guard: other lengths on the same side of a limit compile nothing."""
    from unirl_kernels.backends import cpu

    monkeypatch.setattr(cpu, "kernels_by_vocab", lambda device, dtype: (("rows", 20), ("composed", ANY_VOCAB)))
    backends._by_vocab.cache_clear()
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    function = torch.compile(
        lambda x: uk.fused_loss(x, batch, uk.sft()).loss, fullgraph=True, dynamic=True, backend=count
    )
    batch = uk.Batch(torch.zeros(1, 2, dtype=torch.int64))
    try:
        for vocab in (17, 19, 23, 29):
            x = torch.randn(1, 2, vocab)
            torch.testing.assert_close(function(x), torch.nn.functional.cross_entropy(x[0], batch.target[0]))
        assert len(graphs) == 2
    finally:
        backends._by_vocab.cache_clear()
        torch.compiler.reset()
