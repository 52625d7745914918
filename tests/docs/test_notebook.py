"""The notebook runs from its first cell to its last, and says what it promises."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests import ROOT

NOTEBOOK: dict[str, Any] = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_cells_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    state = torch.random.get_rng_state()
    try:
        for n, source in enumerate(CODE):
            exec(compile(source, f"cell {n}", "exec"), names)
    finally:
        torch.random.set_rng_state(state)
    said = capsys.readouterr().out
    assert names["grpo_violations"] == names["own_violations"] == []
    assert "GC = " in said
    assert "d_entropy = " in said
    assert names["linear"].loss.item() == pytest.approx(names["whole"].loss.item(), rel=1e-5)
    assert names["hidden"].grad.abs().sum() > 0


def test_its_checks_see_a_wrong_gradient() -> None:
    """The list of violations is not empty because nothing is compared."""
    names: dict[str, Any] = {}
    for source in CODE:
        source = source.replace("own.loss.backward()", "own.loss.backward(); logits.grad[0, 0] *= 1 + 1e-4")
        source = source.replace("out.loss.backward()", "out.loss.backward(); logits.grad[0, 0] *= 1 + 1e-4")
        exec(source, names)
        if "own_violations" in names:
            break
    assert names["grpo_violations"]
    assert names["own_violations"]


def test_outputs_are_stripped() -> None:
    for cell in NOTEBOOK["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert max(map(len, cell["source"])) <= 120
