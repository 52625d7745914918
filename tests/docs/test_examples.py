"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import unirl_kernels as uk
from tests import ROOT

EXAMPLES = ROOT / "examples"


def test_own_objective_learns() -> None:
    command = [sys.executable, str(EXAMPLES / "own_objective.py"), "--steps", "30"]
    where = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=where)
    assert result.returncode == 0, result.stderr
    assert "GC = " in result.stdout
    learnt = [float(reward) for reward in re.findall(r"reward (\S+)", result.stdout)]
    assert learnt[0] < 0.5 < 0.8 < learnt[-1], result.stdout


@pytest.mark.slow
def test_tensor_parallel_learns() -> None:
    program = str(EXAMPLES / "tensor_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    where = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=where)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", result.stdout)]
    assert losses[0] > 4 > 1 > losses[-1], result.stdout


class _Letters:
    """A tokenizer of characters: a stand-in of which the loop uses no more than this."""

    eos_token_id = 0

    def apply_chat_template(self, chats: list[Any], **options: Any) -> Any:
        from transformers import BatchEncoding

        texts = [chat[-1]["content"] for chat in chats]
        longest = max(map(len, texts))
        ids = [[0] * (longest - len(text)) + [ord(c) for c in text] for text in texts]
        mask = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        return BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type="pt")

    def batch_decode(self, ids: torch.Tensor, **options: Any) -> list[str]:
        return ["".join(chr(max(32, i)) for i in row) for row in ids.tolist()]


@pytest.fixture
def grpo_loop() -> Any:
    pytest.importorskip("transformers", reason="the packages of the demo are not installed")
    pytest.importorskip("reasoning_gym", reason="the packages of the demo are not installed")
    spec = importlib.util.spec_from_file_location("grpo_loop", EXAMPLES / "grpo_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _letter_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2, eos_token_id=0, pad_token_id=0, bos_token_id=None)
    return LlamaForCausalLM(config).eval()


def test_grpo_loop_moves_its_model(grpo_loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = grpo_loop.sample

    def sample(*args: Any) -> Any:
        *tokens, answers = real(*args)
        right = [str(sum(map(int, re.findall(r"\d+", entry["question"])))) for entry in args[2]]
        return *tokens, [right[i // 3] if i % 3 == 0 else answer for i, answer in enumerate(answers)]  # one of three

    monkeypatch.setattr(grpo_loop, "sample", sample)
    model = _letter_model()
    before = model.lm_head.weight.detach().clone()
    seen = list(grpo_loop.train(model, _Letters(), steps=2, questions=2, group=3, max_new_tokens=5))
    assert len(seen) == 2
    for reward, loss, kl, norm in seen:
        assert reward == pytest.approx(1 / 3)
        assert math.isfinite(loss)
        assert 0 < kl < 1
        assert norm > 0
    assert not torch.equal(model.lm_head.weight, before)


def test_grpo_loop_scores_its_samples_as_the_model_does(grpo_loop: Any) -> None:
    """Left padding, positions and masks: statistics of a padded batch are those of each sample by itself."""
    model = _letter_model()
    entries = [{"question": "Calculate 1 + 2."}, {"question": "Calculate 11 + 22."}]
    ids, mask, completion, _ = grpo_loop.sample(model, _Letters(), entries, 2, 40)
    target = uk.shift_targets(ids, completion)
    with torch.no_grad():
        logp = uk.linear_token_stats(*grpo_loop.head(model, ids, mask), target).logp
        for row, kept, scored, own in zip(ids, mask.bool(), completion.bool(), logp, strict=True):
            alone = torch.log_softmax(model(input_ids=row[kept][None]).logits[0], -1)
            expected = alone[:-1].gather(-1, row[kept][1:, None])[:, 0][scored[kept][1:]]
            torch.testing.assert_close(own[:-1][scored[1:]], expected, rtol=1e-4, atol=1e-4)
            written = row[scored].tolist()
            assert 0 not in written[:-1]  # ends count, what follows them does not
            assert len(written) == 40 or written[-1] == 0
