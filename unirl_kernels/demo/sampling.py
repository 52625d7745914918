"""Completions of a policy, and their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unirl_kernels.demo.model import LanguageModel
from unirl_kernels.demo.questions import Question, Questions, prompt_tokens
from unirl_kernels.demo.sequences import Sequences, lay_out


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
    """How completions are drawn and judged.

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
        prompts = [prompt_tokens(self.tokenizer, question) for question in questions]
        ends = self._ends(model)
        completions = [_until_end(tokens, ends) for tokens in self._complete(model, prompts, ends, after_token)]
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]
        repeated = [i for i in range(len(questions)) for _ in range(self.group)]
        verdicts = [self.questions.verdict(questions[i], text) for i, text in zip(repeated, texts, strict=True)]
        sequences = lay_out([prompts[i] for i in repeated], completions, model.device)
        return Samples(sequences, texts, torch.tensor(verdicts, device=model.device), self.group)

    def gold(self, model: LanguageModel, questions: Sequence[Question]) -> Sequences:
        """The questions with their gold answers."""
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        answers = [[*self.tokenizer(q.gold, add_special_tokens=False).input_ids, *end] for q in questions]
        return lay_out([prompt_tokens(self.tokenizer, q) for q in questions], answers, model.device)

    def _ends(self, model: LanguageModel) -> list[int]:
        """Ids of the tokens that end a completion: a model may name several."""
        ends = model.network.generation_config.eos_token_id
        named = ends if isinstance(ends, list) else [ends]
        return sorted({i for i in (*named, self.tokenizer.eos_token_id) if i is not None})

    @torch.no_grad()
    def _complete(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        ends: Sequence[int],
        after_token: Callable[[], object],
    ) -> list[list[int]]:
        """Draw completions from the model's distribution itself: no top-k, no penalty, temperature 1.

        Written out because ``generate`` would follow the model's own settings of those. Each prompt is read once,
        and its cache shared by its group.
        """
        read = lay_out(prompts, [[]] * len(prompts), model.device)
        output = model.forward(
            input_ids=read.input_ids,
            attention_mask=read.attention.long(),
            position_ids=read.positions,
            logits_to_keep=1,
            use_cache=True,
        )
        cache = output.past_key_values
        cache.batch_repeat_interleave(self.group)
        logits = output.logits[:, -1].repeat_interleave(self.group, 0)
        attention = read.attention.long().repeat_interleave(self.group, 0)
        stop = torch.tensor(ends, device=model.device)
        done = torch.zeros(len(logits), dtype=torch.bool, device=model.device)
        tokens: list[Tensor] = []
        while True:
            tokens.append(torch.multinomial(logits.float().softmax(-1), 1, generator=self.generator))
            done |= torch.isin(tokens[-1].squeeze(-1), stop)
            after_token()
            if len(tokens) == self.max_new_tokens or bool(done.all()):
                return torch.cat(tokens, 1).tolist()
            attention = torch.cat([attention, torch.ones_like(tokens[-1])], 1)
            logits = model.forward(
                input_ids=tokens[-1],
                attention_mask=attention,
                position_ids=attention.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """A completion up to and with the first token that ends it."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens
