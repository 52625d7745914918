"""The example for TRL trains, on a tiny model, and compares heads that agree."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install '.[trl]'")
pytest.importorskip("reasoning_gym", reason="the packages of the demo are not installed")

os.environ["HF_HUB_OFFLINE"] = "1"

from tests import ROOT
from tests.integrations.trl.heads import FUSED
from tests.integrations.trl.models import save


@pytest.fixture
def example() -> ModuleType:
    path = ROOT / "examples" / "trl_grpo.py"
    spec = importlib.util.spec_from_file_location("trl_grpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rewards_right_answers(example: ModuleType) -> None:
    asked = example.questions(3)
    sums = [sum(map(int, re.findall(r"\d+", chat[-1]["content"]))) for chat in asked["prompt"]]
    answers = [f"{sums[0]}", f"1 + 2 = {sums[1]}.\n", f"= {sums[2] + 1}"]
    chats = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert example.right(chats, number=asked["number"], prompts=asked["prompt"]) == [1.0, 1.0, 0.0]


@pytest.mark.skipif(not FUSED, reason="trl before 1.15 has no fused head to compare with")
def test_trains_and_compares(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("llama", tmp_path)
    monkeypatch.chdir(tmp_path)
    example.main(["--model", str(tmp_path), "--steps", "2", "--length", "4"])
    out = capsys.readouterr().out
    assert "step 2" in out
    assert re.search(r"TRL's own head +\S+ s +\d+ MiB", out)
    scored, places = map(int, re.findall(r"(\d+) tokens of (\d+)", out)[0])
    assert 0 < scored <= 8 * 4 < places
    assert float(re.findall(r"differ by (\S+) of", out)[0]) < 1e-5
