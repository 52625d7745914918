"""A default device of the caller's does not matter: each tensor is made where it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import unirl_kernels as uk
from tests.objectives.test_variants import batch_of, chunk, data_of, plans_of
from tests.objectives.variants.rows import Row
from tests.objectives.variants.table import ROWS
from unirl_kernels.objectives import scopes


def makes_tensors(row: Row) -> bool:
    """Whether the row itself makes a tensor: a count, or a coefficient."""
    loss = row.loss()
    return "tensor(" in repr(loss) or any(isinstance(term.coefficient, torch.Tensor) for term in loss.terms)


@pytest.mark.parametrize("row", [row for row in ROWS if not makes_tensors(row)], ids=str)
def test_objectives(row: Row) -> None:
    scopes._remembered_fault.cache_clear()
    data = data_of(row.lengths)
    with torch.device("meta"):
        loss = row.loss()
    for packed in (False, True):
        batch, weight = batch_of(row, data, packed), data.weight
        logits, hidden = (data.laid_out(x, packed, 0.0).requires_grad_() for x in (data.logits, data.hidden))
        plans, head = list(plans_of(loss)), chunk(data, 7)
        with torch.device("meta"):
            for plan in plans:
                out = uk.fused_loss(logits, batch, loss, plan=plan)
                out.loss.backward()
                assert all(x.device.type == "cpu" for x in (out.loss, *out.metrics.values()))
            uk.fused_linear_loss(hidden, weight, batch, loss, plan=head).loss.backward()
            with torch.no_grad():
                assert uk.fused_linear_loss(hidden, weight, batch, loss, plan=head).loss.device.type == "cpu"


def test_import() -> None:
    code = "import torch; torch.set_default_device('meta'); import unirl_kernels as uk; uk.dpo().check_scopes()"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
