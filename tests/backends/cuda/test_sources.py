"""The CUDA kernels where there is no GPU: what they compile to, and their arithmetic on the CPU.

A kernel must not spill, must keep within the registers that let its blocks share a multiprocessor, and must move 16
bytes at a time. ``cluster_model.cpp`` sums real rows in the kernel's own order, with the kernel's own headers.
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

import pytest
import torch
from torch import Tensor

from tests import ROOT
from tests.cases import Shape, make_logits
from unirl_kernels.backends import ReadoutArgs, choose, cuda, unavailable

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
models = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Usage:
    name: str
    registers: int
    stack: int
    operations: Counter[str]

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
    return [Usage(name, int(r), int(stack), Counter(operation.findall(code[name]))) for name, r, stack in found]


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


@models
def test_bindings_compile_against_torch(tmp_path: Path) -> None:
    """torch's own headers for CUDA come with every build of it, but for one that a build with CUDA generates."""
    from torch.utils.cpp_extension import include_paths

    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
    if not (cuda / "cuda_runtime.h").is_file():
        pytest.skip(f"needs CUDA's headers, not found in {cuda} (set CUDA_HOME)")
    folders = [*include_paths(), sysconfig.get_paths()["include"], cuda]
    macros = ["-DUNIRL_WITH_CUDA", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    source = ROOT / "csrc/cuda/bindings.cpp"
    command = [CXX, "-std=c++20", "-fsyntax-only", *macros, *(f"-isystem{f}" for f in folders), source]
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
    """Narrow ones are a row's scalars and the two edges of an unaligned slice."""
    source, found = kernels
    for kernel in found:
        wide = {op.split(".")[0] for op in kernel.operations if op.endswith(".128")}
        loads = "LDG" if source == "scale" else "LDGSTS"
        assert wide >= ({loads} if source == "token_stats" else {loads, "STG"}), kernel
        narrow = sum(
            n for op, n in kernel.operations.items() if re.match(r"LDG\b|STG\b", op) and not op.endswith("128")
        )
        assert narrow <= 20, kernel


@compiles
def test_a_row_meets_at_cluster_barriers(kernels: tuple[str, list[Usage]]) -> None:
    """One for the start of all blocks, one for their parts; and the two waits."""
    source, found = kernels
    for kernel in found:
        barriers = (kernel.operations["UCGABAR_ARV"], kernel.operations["UCGABAR_WAIT"])
        assert barriers == ((0, 0) if source == "scale" else (2, 2)), kernel


@cache
def _model(folder: Path) -> Path:
    program = folder / "cluster_model"
    source = Path(__file__).with_name("cluster_model.cpp")
    subprocess.run([CXX, "-std=c++17", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    return program


@dataclass(frozen=True)
class Row:
    """A row of logits and its target, in the file that the model reads."""

    program: Path
    file: Path
    logits: Tensor
    target: int

    def sums(
        self, logit_bytes: int, cluster: int, softcap: float = 0, temperature: float = 1
    ) -> tuple[list[float], int]:
        """logp, entropy, lse; and the cluster that the launcher would take."""
        arguments = (len(self.logits), logit_bytes, cluster, softcap, temperature, self.target)
        done = subprocess.run(
            [self.program, self.file, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        *values, chosen = done.stdout.split()
        return [float(value) for value in values], int(chosen)


@pytest.fixture
def row(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Row:
    vocab, fill = request.param
    torch.manual_seed(vocab)
    target = torch.tensor([[vocab // 3]])
    logits = make_logits(Shape("row", "", (1,), vocab, fill=fill), target)[0, 0]
    file = tmp_path / "row"
    logits.numpy().tofile(file)
    return Row(_model(tmp_path_factory.getbasetemp()), file, logits, vocab // 3)


def truth(row: Row, softcap: float, temperature: float) -> list[float]:
    z = row.logits.double()
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(0)
    entropy = -torch.where(logp.isinf(), 0.0, logp.exp() * logp).sum()
    return [logp[row.target].item(), entropy.item(), z.logsumexp(0).item()]


VOCABULARIES = (1, 7, 2047, 9496, 32000, 50257, 151669, 151936, 262208)
CLUSTERS = (1, 2, 4, 8, 16)


@models
@pytest.mark.parametrize(
    "row", [(vocab, "peaked") for vocab in VOCABULARIES] + [(50257, "masked")], indirect=True, ids=str
)
@pytest.mark.parametrize("logit_bytes", [2, 4])
def test_order_of_the_sums(row: Row, logit_bytes: int) -> None:
    """Within 2e-6 of fp64 for every cluster size, also those that are not chosen."""
    for cluster in CLUSTERS:
        for softcap, temperature in ((0.0, 1.0), (30.0, 0.7)):
            values, _ = row.sums(logit_bytes, cluster, softcap, temperature)
            for value, true in zip(values, truth(row, softcap, temperature), strict=True):
                assert abs(value - true) < 2e-6, (cluster, softcap)


@models
@pytest.mark.parametrize("row", [(50257, "certain")], indirect=True, ids=str)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_certain_target_keeps_its_relative_accuracy(row: Row, cluster: int) -> None:
    """1 - p_y is two units of fp32 beside 1; what the maximum's own thread sums beside that 1 is lost, but no more."""
    (logp, _, _), _ = row.sums(2, cluster)
    true = truth(row, 0, 1)[0]
    assert -1e-6 < true < 0
    assert abs(logp / true - 1) < 1 / 64


@models
@pytest.mark.parametrize(
    ("row", "clusters"),
    [
        ((7, "peaked"), (1, 1)),
        ((32000, "peaked"), (2, 4)),
        ((151936, "peaked"), (8, 8)),
        ((262208, "peaked"), (8, 16)),
    ],
    indirect=["row"],
    ids=str,
)
def test_cluster_sizes(row: Row, clusters: tuple[int, int]) -> None:
    """Of rows in 16 and in 32 bits."""
    assert tuple(row.sums(logit_bytes, 1)[1] for logit_bytes in (2, 4)) == clusters


def test_why_it_cannot_run() -> None:
    cpu = torch.device("cpu")
    assert unavailable("cuda", cpu) == "it runs on CUDA devices, not on cpu"
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run on cpu: it runs on CUDA devices"):
        choose(cpu, "cuda", None)


def test_says_that_it_does_not_observe() -> None:
    readout = ReadoutArgs(1.0, None, 1.0, None)
    with pytest.raises(RuntimeError, match=r"no kernel for observations; Plan\(backend='triton'\) has one"):
        cuda.token_observations(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), readout)


@pytest.mark.skipif(torch.version.cuda is not None, reason="the extension may be built with CUDA")
def test_says_that_it_is_not_built() -> None:
    cuda._native.cache_clear()
    assert "without CUDA" in (cuda.unavailable(torch.device("cuda", 0)) or "")
