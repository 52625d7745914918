"""The row kernels compiled for arm64 (NEON), run by an emulator at small sizes.

Debian: ``apt install g++-aarch64-linux-gnu qemu-user``.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests import ROOT
from tests.backends.cpu.rows import DTYPES, GRPO, PARAMS, READOUTS, fields_of, row_dtype, rows_of
from unirl_kernels.backends import eager
from unirl_kernels.backends.groups import ProgramArgs, ReadoutArgs
from unirl_kernels.batch import IGNORE
from unirl_kernels.testing.budgets import condition_of, violations

COMPILERS = [shutil.which(f"aarch64-linux-gnu-g++{version}") for version in ("", "-15", "-14", "-13", "-12")]
COMPILER = next(filter(None, COMPILERS), None)
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
UNITS = ("cpu/rows.cpp", "cpu/dispatch.cpp", "cpu/baseline.cpp", "cpu/fp64.cpp", "program_code.cpp")
FLAGS = ("-std=c++20", "-O3", "-static", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
"""The last three as in setup.py."""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++"),
    pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64"),
]


class Found(NamedTuple):
    loss: Tensor  # [T], as all that follow but the last
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    largest: Tensor
    argmax: Tensor
    d_logits: Tensor  # [T, V]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("arm64") / "rows"
    units = [str(ROOT / "csrc" / unit) for unit in UNITS]
    here = str(Path(__file__).with_name("rows_driver.cpp"))
    command = [str(COMPILER), *FLAGS, f"-I{ROOT / 'csrc'}", here, *units, "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(driver: Path, logits: Tensor, target: Tensor, readout: ReadoutArgs, fields: Tensor) -> Found:
    """What the kernels make of [1, T, V] logits."""
    _, rows, vocab = logits.shape
    text = GRPO.text.encode()
    sizes = struct.pack("<5q", DTYPES.index(logits.dtype), rows, vocab, len(PARAMS), len(text))
    floats = struct.pack("<3d", readout.scale, readout.softcap or 0.0, readout.temperature)
    given = b"".join([sizes, floats, text, *map(_bytes, (fields, logits, target, PARAMS))])
    answer = subprocess.run([str(EMULATOR), str(driver)], input=given, capture_output=True, check=True).stdout
    values, at = [], 0
    for name in Found._fields:
        shape = logits.shape[1:] if name == "d_logits" else (rows,)
        dtype = {"d_logits": logits.dtype, "argmax": torch.int64}.get(name, row_dtype(logits.dtype))
        size = torch.Size(shape).numel() * dtype.itemsize
        values.append(torch.frombuffer(bytearray(answer[at : at + size]), dtype=dtype).view(shape))
        at += size
    assert at == len(answer)
    return Found(*values)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def expected(logits: Tensor, target: Tensor, readout: ReadoutArgs, fields: Tensor) -> Found:
    """The same by the eager backend, in the dtype of the logits."""
    d_logits = torch.empty_like(logits)
    program = ProgramArgs(GRPO.text, fields, PARAMS)
    rows = eager.fused_loss(logits, target, readout, program, d_logits, "rows")
    observed = eager.token_observations(logits, target, readout)
    return Found(*(x.squeeze(0) for x in (*rows, *observed.observations, d_logits)))


@pytest.mark.parametrize("readout", ["identity", "cold", "negative", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 67, 8192 + 77])
def test_agrees_with_fp64(driver: Path, dtype: torch.dtype, readout: str, vocab: int) -> None:
    torch.manual_seed(vocab)
    logits, target = rows_of(dtype, 4, vocab)
    fields = fields_of(logits, target, READOUTS[readout])
    target[0, 2] = IGNORE
    found = run(driver, logits, target, READOUTS[readout], fields)
    plain = expected(logits, target, READOUTS[readout], fields)
    truth = expected(logits.double(), target, READOUTS[readout], fields.double())
    scale = float(truth.lse.abs().max())  # every value is a difference of numbers of this size
    for name, x, of_plain, exact in zip(Found._fields, found, plain, truth, strict=True):
        if name == "argmax":
            assert torch.equal(x, exact)
        else:
            assert not violations(x, of_plain, exact, condition=condition_of(exact, scale)), name
    assert not found.d_logits[2].any()


def test_rows_without_a_distribution(driver: Path) -> None:
    """-inf columns have probability 0; NaN and a target outside the vocabulary make the row NaN."""
    logits, target = rows_of(torch.float32, 4, 300)
    logits[0, 0, ::2] = -torch.inf
    target[0, 0] = 1
    logits[0, 1, 7] = torch.nan
    target[0, 2] = 300
    found = run(driver, logits, target, READOUTS["identity"], fields_of(logits, target.clamp(max=299)))
    assert found.d_logits[0].isfinite().all()
    assert not found.d_logits[0, ::2].any()
    assert found.logp[1:3].isnan().all()
    assert found.d_logits[1:3].isnan().all()
    assert found.argmax[1:3].tolist() == [-1, -1]
    assert found.d_logits[3].isfinite().all()
