"""Completions of a policy, and their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from examples.demo.model import LanguageModel
from examples.demo.questions import Question, Questions, prompt_tokens
from examples.demo.sequences import Prompts, Sequences, lay_out, lay_out_prompts


@dataclass(frozen=True, eq=False)
class Samples:
    """Completions of Q questions, G for each, those of a question next to each other; S = Q * G.

    Args:
        sequences: the samples with their prompts.
        texts: what they say.
        verdicts: [S] fp32, the rule reward I(o) in {0, 1}.
        group: G.
    """

    sequences: Sequences
    texts: list[str]
    verdicts: Tensor
    group: int


@dataclass(frozen=True)
class Sampler:
    """Draws completions, and scores them.

    Args:
        tokenizer: the model's.
        questions: the verifier.
        group: completions per question.
        max_new_tokens: tokens of the longest completion.
        generator: source of chance, on the model's device.
    """

    tokenizer: Any
    questions: Questions
    group: int
    max_new_tokens: int
    generator: torch.Generator

    def samples(
        self, model: LanguageModel, questions: Sequence[Question], after_token: Callable[[], object] = lambda: None
    ) -> Samples:
        """A group of the model's completions for each question. ``after_token`` is called to show progress."""
        prompts = self._prompts(model, questions)
        ends = self._ends(model)
        completions = [_until_end(tokens, ends) for tokens in self._complete(model, prompts, ends, after_token)]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]
        prompt_of = [i for i in range(len(questions)) for _ in range(self.group)]
        verdicts = [self.questions.verdict(questions[i], text) for i, text in zip(prompt_of, texts, strict=True)]
        sequences = lay_out(prompts, completions, prompt_of)
        return Samples(sequences, texts, torch.tensor(verdicts, device=model.device), self.group)

    def gold(self, model: LanguageModel, questions: Sequence[Question]) -> Sequences:
        """The questions with their gold answers."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        answers = [[*self.tokenizer(q.gold, add_special_tokens=False).input_ids, *end] for q in questions]
        return lay_out(self._prompts(model, questions), answers, range(len(questions)))

    def _prompts(self, model: LanguageModel, questions: Sequence[Question]) -> Prompts:
        return lay_out_prompts([prompt_tokens(self.tokenizer, q) for q in questions], model.device)

    def _ends(self, model: LanguageModel) -> list[int]:
        """Ids of the tokens that end a completion: a model may name several."""
        ends = model.network.generation_config.eos_token_id
        named = ends if isinstance(ends, list) else [ends]
        return sorted({i for i in (*named, self.tokenizer.eos_token_id) if i is not None})

    @torch.no_grad()
    def _complete(
        self, model: LanguageModel, prompts: Prompts, ends: Sequence[int], after_token: Callable[[], object]
    ) -> list[list[int]]:
        """Draw completions from the model's distribution itself: no top-k, no penalty, temperature 1.

        Written out because ``generate`` would follow the model's own settings of those.
        """
        prompt_of = torch.arange(len(prompts.ids), device=model.device).repeat_interleave(self.group)
        cache = model.read(prompts)
        cache.batch_select_indices(prompt_of)
        attention, position = prompts.mask[prompt_of], prompts.positions[prompt_of, -1:]
        tokens = [prompts.ids[prompt_of, -1:]]
        stop = torch.tensor(ends, dtype=torch.int64, device=model.device)
        done = torch.zeros_like(prompt_of, dtype=torch.bool)
        while len(tokens) <= self.max_new_tokens and not bool(done.all()):
            logits = model.extend(cache, tokens[-1], attention, position)[:, -1]
            tokens.append(torch.multinomial(logits.float().softmax(-1), 1, generator=self.generator))
            done |= torch.isin(tokens[-1].squeeze(-1), stop)
            attention, position = pad(attention, (0, 1), value=True), position + 1
            after_token()
        return torch.cat(tokens[1:], 1).tolist()


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """A completion up to and with the first token that ends it."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
