"""The demo's questions, its samples, and the batches that the six algorithms get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the demo's extras are not installed")
pytest.importorskip("reasoning_gym", reason="the demo's extras are not installed")
pytest.importorskip("matplotlib", reason="the demo's extras are not installed")
pytest.importorskip("rich", reason="the demo's extras are not installed")

import unirl_kernels as uk
from examples.demo.model import LanguageModel
from examples.demo.questions import Question, Questions, extract_answer, prompt_tokens
from examples.demo.sampling import Sampler, Samples
from examples.demo.sequences import lay_out, lay_out_prompts
from examples.demo.sources import (
    GAE_LAMBDA,
    KL_IN_REWARD,
    best_worst_pairs,
    samples_with_advantages,
    token_advantages,
)
from tests.demo.cases import CPU, PLAN, VOCAB, six_sources
from unirl_kernels.testing import oracle


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("9 + 12 = 21", "21"),
        ("The sum is 21.", "21"),
        ("9 + 12 = 21\n\nThis is because 9 is one less than 10.", "21"),
        ("12 - 21 = -9", "-9"),
        ("9 - 2 = 7, 7 + 1 = 8.", "8"),
        ("= **1,204.0**", "1204"),
        ("= 0.50", "0.50"),
        ("= 007", "7"),
        ("it is 9-2", "2"),
        ("nothing", None),
        ("", None),
    ],
)
def test_answer_is_extracted(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


def test_verdict_accepts_the_right_answer_and_no_other() -> None:
    questions = Questions(0)
    for question in questions.draw(20):
        right = int(question.entry["answer"])
        assert questions.verdict(question, question.gold) == 1
        assert questions.verdict(question, f"That makes {right}.") == 1
        assert questions.verdict(question, f"= {right + 1}") == 0
        # contains the right digits: worth part of a point to the verifier
        assert questions.verdict(question, f"= {right}0") == 0
        assert questions.verdict(question, "I do not know") == 0


def test_questions_depend_on_the_seed_and_are_not_repeated() -> None:
    first, again, other = Questions(0), Questions(0), Questions(1)
    drawn = [q.text for q in first.draw(5)]
    assert drawn == [q.text for q in again.draw(5)]
    assert drawn != [q.text for q in other.draw(5)]
    assert drawn != [q.text for q in first.draw(5)]


class _Chat:
    """A tokenizer of characters with a chat template that may not know a system role."""

    chat_template = "given"

    def __init__(self, system_role: bool) -> None:
        self._system_role = system_role

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        from jinja2 import TemplateError

        assert options["add_generation_prompt"]
        if turns[0]["role"] == "system" and not self._system_role:
            raise TemplateError("System role not supported")
        return "|".join(turn["role"] for turn in turns) + "|" + turns[-1]["content"]

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(c) for c in text])


@pytest.mark.parametrize(
    ("system_role", "prompt"), [(True, "system|user|assistant|user|why?"), (False, "user|assistant|user|why?")]
)
def test_prompt_follows_the_models_chat_format(system_role: bool, prompt: str) -> None:
    tokens = prompt_tokens(_Chat(system_role), Question("why?", "", {}))
    assert "".join(map(chr, tokens)) == prompt


def test_sequences_predict_every_token_of_the_completion_and_nothing_else() -> None:
    prompts = lay_out_prompts([[5, 6, 7], [8, 9]], CPU)
    sequences = lay_out(prompts, [[1, 2], [3, 4, 0], [5]], [0, 1, 1])
    assert sequences.inputs.tolist() == [[7, 1, 2, 0], [9, 3, 4, 0], [9, 5, 0, 0]]
    x = uk.IGNORE
    assert sequences.target.tolist() == [[1, 2, x, x], [3, 4, 0, x], [5, x, x, x]]
    chosen = sequences.select(torch.tensor([2, 1]))
    assert chosen.prompts.ids.tolist() == [[0, 8, 9]]
    assert chosen.target.tolist() == [[5, x, x, x], [3, 4, 0, x]]


class _Scripted:
    """A model that generates given tokens. Either of two tokens ends a completion."""

    device = CPU
    network = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0, 9]))

    def __init__(self, lines: list[list[int]]) -> None:
        self._lines = lines
        self.inputs: list[list[int]] = []

    def read(self, prompts: Any) -> Any:
        return SimpleNamespace(batch_select_indices=lambda rows: None)

    def extend(self, cache: Any, inputs: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        spoken = len(self.inputs)
        self.inputs.append(inputs.squeeze(-1).tolist())
        said = torch.tensor([line[spoken] for line in self._lines])
        return torch.nn.functional.one_hot(said, VOCAB).unsqueeze(1) * 100.0


def test_completions_end_with_any_of_the_models_ends_or_when_they_are_too_long(sampler: Sampler) -> None:
    lines = [[3, 4, 0, 7, 7, 7], [9, 7, 7, 7, 7, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0]]
    scripted = _Scripted(lines)
    samples = sampler.samples(scripted, sampler.questions.draw(1))  # type: ignore[arg-type]
    rows = zip(samples.sequences.ids, samples.sequences.mask, strict=True)
    assert [row[mask].tolist() for row, mask in rows] == [[3, 4, 0], [9], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 0]]
    assert scripted.inputs[1:] == [list(said) for said in zip(*lines, strict=True)][:-1]

    stopped = _Scripted([[0, 7], [0, 7], [1, 9], [0, 7]])  # nothing is drawn after the last end
    assert sampler.samples(stopped, sampler.questions.draw(1)).sequences.ids.shape == (4, 2)  # type: ignore[arg-type]


def test_same_seed_same_samples(model: LanguageModel, sampler: Sampler) -> None:
    drawn = sampler.questions.draw(2)
    first = sampler.samples(model, drawn)
    sampler.generator.manual_seed(0)
    assert sampler.samples(model, drawn).texts == first.texts
    assert sampler.samples(model, drawn).texts != first.texts


def test_advantages_of_tokens_are_the_sums_of_their_definition() -> None:
    torch.manual_seed(2)
    lengths = [5, 1, 3]
    valid = torch.arange(5) < torch.tensor(lengths).unsqueeze(-1)
    reward, value, penalty = torch.tensor([1.0, 0.0, 1.0]), torch.rand(3), torch.randn(3, 5)
    found = token_advantages(valid, reward, torch.where(valid, penalty, 0.0), value)
    for i, n in enumerate(lengths):
        delta = [-penalty[i, t] + (reward[i] - value[i] if t == n - 1 else 0) for t in range(n)]
        for t in range(5):
            expected = sum(GAE_LAMBDA ** (k - t) * delta[k] for k in range(t, n))
            assert found[i, t].item() == pytest.approx(float(expected), abs=1e-6)


def test_pairs_are_a_right_and_a_wrong_sample_of_one_question(samples: Samples) -> None:
    ref_logp = torch.randn(samples.sequences.target.shape)
    source = best_worst_pairs(samples, ref_logp)
    # The second question's samples are all right, it has no preference. Best: the first right, worst: the last wrong.
    rows = torch.tensor([1, 8, 3, 10])
    assert torch.equal(source.sequences.target, samples.sequences.target[rows])
    assert torch.equal(source.batch.ref_logp, ref_logp[rows])
    assert torch.equal(source.sequences.prompt_of, torch.tensor([0, 1, 0, 1]))
    assert source.data.startswith("2 best/worst pairs")


def test_without_any_preference_pairs_are_ties_of_different_samples_and_say_so(samples: Samples) -> None:
    nobody = Samples(samples.sequences, samples.texts, torch.zeros(12), samples.group)
    source = best_worst_pairs(nobody, torch.zeros(samples.sequences.target.shape))
    rows = torch.tensor([0, 4, 8, 3, 7, 11])
    assert torch.equal(source.sequences.target, samples.sequences.target[rows])
    assert source.data.startswith("3 ties (no preference)")


def test_the_six_sources_hold_what_their_algorithms_read(
    model: LanguageModel, sampler: Sampler, samples: Samples
) -> None:
    sources = six_sources(model, sampler, samples)
    assert [s.algorithm for s in sources] == list(oracle.LOSSES)
    sft, rft, online, dpo, ppo, grpo = (s.batch for s in sources)
    assert sft.advantage is None
    assert torch.equal(rft.advantage, samples.verdicts)
    assert torch.equal(online.advantage, samples.verdicts)
    assert dpo.ref_logp is not None
    assert ppo.advantage.shape == ppo.target.shape
    assert torch.equal(grpo.advantage, uk.group_advantages(samples.verdicts, samples.group))
    for batch in (ppo, grpo):
        assert batch.old_logp is not None
    gold_text = sampler.tokenizer.decode(sources[0].sequences.ids[0][sources[0].sequences.mask[0]])
    assert "=" in gold_text
    assert gold_text.endswith("<end>")
    for source in sources:
        with torch.no_grad():
            logits = model.logits(source.sequences)
        loss = uk.fused_loss(logits, source.batch, source.loss, plan=PLAN).loss
        torch.testing.assert_close(loss, oracle.loss(source.algorithm, logits, source.batch), rtol=1e-4, atol=1e-6)


def test_ppo_advantages_hold_the_verdict_the_baseline_and_the_penalty(
    model: LanguageModel, sampler: Sampler, samples: Samples
) -> None:
    ref = model.log_probs(samples.sequences, PLAN)
    shift = 0.5
    old = torch.where(samples.sequences.target == uk.IGNORE, ref, ref + shift)
    advantage = samples_with_advantages(samples, old, ref).batch.advantage
    last = samples.sequences.mask.sum(-1) - 1
    baseline = [1 / 3, 0, 1 / 3, 1 / 3, 1, 1, 1, 1, 1 / 3, 2 / 3, 2 / 3, 1 / 3]  # mean verdict of the three others
    expected = samples.verdicts - torch.tensor(baseline) - KL_IN_REWARD * shift
    torch.testing.assert_close(advantage[torch.arange(12), last], expected)
    assert (advantage[samples.sequences.target == uk.IGNORE] == 0).all()
