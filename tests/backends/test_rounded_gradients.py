"""Gradients in bf16 of logits in fp32, as matmuls of 16-bit operands take them: those in fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.backends.triton.rows import OBJECTIVES, READOUTS, make_program, make_rows
from tests.runners import RUNNERS, Runner
from unirl_kernels.backends import COMPOSED, load
from unirl_kernels.backends.groups import RowGradients
from unirl_kernels.batch import IGNORE
from unirl_kernels.program import trace

KERNELS = [runner for runner in RUNNERS if runner.backend != "cpu" and runner.kernel != COMPOSED]
"""The CPU's matmuls take gradients in fp32."""

LAYOUTS = {
    "vectors": (4104, 4104, 0),
    "odd": (4101, 4101, 0),
    "row of one vector": (4, 4, 0),
    "below a vector": (3, 3, 0),
    "shifted": (2056, 2060, 1),
}
"""V, distance between rows and start of the first."""

of_kernels = pytest.mark.parametrize("runner", KERNELS, ids=str)
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def memory(layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """[1, 3, V], and NaN around it."""
    vocab, stride, start = LAYOUTS[layout]
    whole = torch.full((start + 3 * stride + 8,), torch.nan, dtype=dtype, device=device)
    return whole.as_strided((1, 3, vocab), (3 * stride, stride, 1), start)


def check(runner: Runner, rounded: Tensor, exact: Tensor) -> None:
    """One is the other, rounded, and nothing beside it was written."""
    if runner.interpreted:  # which rounds towards zero
        exact = (exact.contiguous().view(torch.int32) & -(2**16)).view(torch.float32)
    assert exact.any()
    assert torch.equal(rounded, exact.to(torch.bfloat16))
    around = rounded._base
    assert around is not None
    assert around.isnan().sum() == around.numel() - rounded.numel()


@of_layouts
@pytest.mark.parametrize(
    ("objective", "readout"), [("kl", "plain"), ("entropy", "softcap"), ("entropy", "temperature")]
)
@of_kernels
def test_one_pass(runner: Runner, objective: str, readout: str, layout: str) -> None:
    rows = make_rows(LAYOUTS[layout][0], shape=(1, 3))
    logits = memory(layout, torch.float32, runner.device).copy_(rows.logits)
    target = rows.target.to(runner.device).index_fill(1, torch.tensor([1], device=runner.device), IGNORE)
    program = make_program(trace([OBJECTIVES[objective]]), rows.fields, logits)
    written = [memory(layout, dtype, runner.device) for dtype in (torch.bfloat16, torch.float32)]
    for d_logits in written:
        load(runner.backend).fused_loss(logits, target, READOUTS[readout], program, d_logits, runner.kernel)
    check(runner, *written)


@of_layouts
@pytest.mark.parametrize("runner", [p for p in KERNELS if p.kernel == load(p.backend).KERNELS[0]], ids=str)
def test_of_statistics(runner: Runner, layout: str) -> None:
    rows, backend, readout = make_rows(LAYOUTS[layout][0], shape=(1, 3)), load(runner.backend), READOUTS["temperature"]
    logits, target = memory(layout, torch.float32, runner.device).copy_(rows.logits), rows.target.to(runner.device)
    moments = backend.token_stats(logits, target, readout).moments
    gradients = RowGradients(*(torch.randn(1, 3, device=runner.device) for _ in range(3)))
    written = [memory(layout, dtype, runner.device) for dtype in (torch.bfloat16, torch.float32)]
    for d_logits in written:
        backend.token_stats_backward(logits, target, readout, moments, gradients, d_logits)
    check(runner, *written)
