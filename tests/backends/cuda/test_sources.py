"""The CUDA kernels where there is no GPU: what they compile to. What they compute is said by ``test_emulated``.

A kernel must not spill, must keep within the registers that let its blocks share a multiprocessor, and must move 16
bytes at a time.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pybind11
import pytest
import torch

from tests import ROOT
from unirl_kernels.backends import choose, cuda, unavailable
from unirl_kernels.backends.groups import ReadoutArgs

ARCHITECTURES = ("sm_90", "sm_100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
REGISTERS = {
    ("fused_loss", False): 48,
    ("fused_loss", True): 64,
    ("token_stats", False): 48,
    ("token_stats", True): 64,
    ("token_stats_backward", False): 48,
    ("token_stats_backward", True): 64,
    ("scale", False): 32,
}
"""Most registers per thread by source and by whether there is a softcap, for nvcc 13.0."""


def _tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit, or the copy that Triton brings."""
    triton = importlib.util.find_spec("triton")
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    found = shutil.which(name)
    return next((p for p in (Path(found or ""), *(d / name for d in places)) if p.is_file()), None)


NVCC, CUOBJDUMP, CXX = _tool("nvcc"), _tool("cuobjdump"), shutil.which("g++") or shutil.which("c++")
compiles = pytest.mark.skipif(not (NVCC and CUOBJDUMP), reason="needs nvcc and cuobjdump (a CUDA toolkit, or Triton's)")


@dataclass(frozen=True)
class Usage:
    name: str
    registers: int
    stack: int
    operations: Counter[str]
    code: tuple[tuple[int, str], ...]  # addresses and instructions

    def loops(self) -> list[list[str]]:
        """Instructions of the loops that hold no other."""
        jump = re.compile(r"BRA(?:\.\w+)* (?:!?U?P\w+, )?0x([0-9a-f]+)")
        targets = [(int(found[1], 16), at) for at, text in self.code if (found := jump.search(text))]
        spans = [(first, last) for first, last in targets if first <= last]
        inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        return [[text for at, text in self.code if first <= at <= last] for first, last in inner]

    @property
    def capped(self) -> bool:
        return "Lb1E" in self.name


def _dump(binary: Path, architecture: str) -> list[Usage]:
    """The kernels of a fat binary for one architecture."""
    usage, sass = (
        subprocess.run(
            [CUOBJDUMP, flag, "-arch", architecture, binary], capture_output=True, text=True, check=True
        ).stdout
        for flag in ("-res-usage", "-sass")
    )
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    operation = re.compile(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]+)", re.MULTILINE)
    instruction = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+([^;]+);", re.MULTILINE)
    return [
        Usage(
            name,
            int(registers),
            int(stack),
            Counter(operation.findall(code[name])),
            tuple((int(at, 16), text.strip()) for at, text in instruction.findall(code[name])),
        )
        for name, registers, stack in found
    ]


@cache
def _compiled(source: Path, folder: Path) -> Path:
    """A fat binary for all architectures; both in one call take two thirds of the time."""
    binary = folder / source.stem
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (a[3:] for a in ARCHITECTURES)]
    command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", *targets, "-fatbin", "-o", binary, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr
    return binary


@pytest.fixture(
    scope="module", params=[(s, a) for s in SOURCES for a in ARCHITECTURES], ids=lambda p: f"{p[0].stem}-{p[1]}"
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Usage]]:
    source, architecture = request.param
    return source.stem, _dump(_compiled(source, tmp_path_factory.getbasetemp()), architecture)


@pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("unit", ["bindings", "module"])
def test_bindings_compile(unit: str) -> None:
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    if not (cuda / "cuda_runtime.h").is_file():
        pytest.skip(f"needs CUDA's headers, not found in {cuda} (set CUDA_HOME)")
    folders = [pybind11.get_include(), sysconfig.get_paths()["include"], cuda]
    command = [CXX, "-std=c++20", "-fsyntax-only", *(f"-isystem{f}" for f in folders), ROOT / f"csrc/cuda/{unit}.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@compiles
def test_budget(kernels: tuple[str, list[Usage]]) -> None:
    source, found = kernels
    # fp32, bf16, fp16, and fp32 with a gradient in bf16; each without and with a softcap.
    assert len(found) == {"scale": 3, "token_stats": 6}.get(source, 8)
    for kernel in found:
        spilled = kernel.stack + sum(n for op, n in kernel.operations.items() if op.startswith(("LDL", "STL")))
        assert spilled == 0, kernel
        assert kernel.registers <= REGISTERS[source, kernel.capped], kernel


@compiles
def test_accesses_are_16_bytes_wide(kernels: tuple[str, list[Usage]]) -> None:
    """Narrow ones are a row's scalars and the two edges of an unaligned slice, in each of four second sweeps."""
    source, found = kernels
    for kernel in found:
        wide = {op.split(".")[0] for op in kernel.operations if op.endswith(".128")}
        loads = "LDG" if source == "scale" else "LDGSTS"
        assert wide >= ({loads} if source == "token_stats" else {loads, "STG"}), kernel
        narrow = sum(
            n for op, n in kernel.operations.items() if re.match(r"LDG\b|STG\b", op) and not op.endswith("128")
        )
        assert narrow <= 23, kernel.name


@compiles
def test_a_row_meets_at_cluster_barriers(kernels: tuple[str, list[Usage]]) -> None:
    """One for the start of all blocks, one for their parts; and the two waits."""
    source, found = kernels
    for kernel in found:
        barriers = (kernel.operations["UCGABAR_ARV"], kernel.operations["UCGABAR_WAIT"])
        assert barriers == ((0, 0) if source == "scale" else (2, 2)), kernel


@compiles
def test_no_block_waits_for_memory_before_it_has_started(kernels: tuple[str, list[Usage]]) -> None:
    """What tells that a block has started releases nothing: a release is a barrier for all of memory."""
    source, found = kernels
    for kernel in found:
        barriers = [text.split(".")[0] for _, text in kernel.code if text.startswith(("MEMBAR", "UCGABAR"))]
        expected = ["UCGABAR_ARV", "UCGABAR_WAIT", "MEMBAR", "UCGABAR_ARV", "UCGABAR_WAIT"]
        assert barriers == ([] if source == "scale" else expected), kernel.name


MOST_INSTRUCTIONS = 17
"""Per logit of bf16 where logits and gradients are aligned: the largest, the sums and the gradient. The two sweeps took
12.1 + 10.75 when the largest was looked for with the sums."""


@compiles
def test_instructions_per_logit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loops are told apart by what they do. Instructions for the target, which one vector of a row takes, count too."""
    binary = _compiled(ROOT / "csrc/cuda/fused_loss.cu", tmp_path_factory.getbasetemp())
    (kernel,) = (k for k in _dump(binary, "sm_90") if "BFloat16" in k.name and "Float32" not in k.name and not k.capped)

    def per_logit(what: str, *others: str) -> float:
        found = []
        for loop in kernel.loops():
            text = "\n".join(loop)
            vectors = len(re.findall(what, text)) // (8 if what == "MUFU.EX2" else 1)
            if vectors and all(other in text for other in others) and (others or "STG" not in text):
                found.append(len(loop) / (8 * vectors))
        return min(found)

    largest = per_logit(r"LDS\.128", "HMNMX")
    sums, gradient = per_logit("MUFU.EX2"), per_logit("MUFU.EX2", "STG")
    assert 0.4 < largest < 1
    assert 5 < sums < 7
    assert 5 < gradient < 10
    assert largest + sums + gradient <= MOST_INSTRUCTIONS, (largest, sums, gradient)


def test_why_it_cannot_run() -> None:
    cpu = torch.device("cpu")
    assert unavailable("cuda", cpu) == "it runs on CUDA devices, not on cpu"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run on cpu: it runs on CUDA devices"):
        choose(cpu, "cuda", None)


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_devices_that_hold_a_row(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 12.0 has 99 KiB of shared memory, too little for the slices."""
    monkeypatch.setattr(cuda, "_native", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    said = "it needs compute capability 9.x or 10.x, the device has {}.{}".format(*capability)
    assert cuda.unavailable(torch.device("cuda", 0)) == (None if runs else said)


def test_says_that_it_does_not_observe() -> None:
    readout = ReadoutArgs(1.0, None, 1.0, None)
    with pytest.raises(RuntimeError, match=r"no kernel for observations; Plan\(backend='triton'\) has one"):
        cuda.token_observations(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), readout)


@pytest.mark.skipif(torch.version.cuda is not None, reason="the extension may be built with CUDA")
def test_says_that_it_is_not_built() -> None:
    cuda._native.cache_clear()
    assert "without CUDA" in (cuda.unavailable(torch.device("cuda", 0)) or "")
