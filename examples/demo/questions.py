"""Questions with a verifier: small sums from reasoning-gym, which a model of 135M parameters solves now and then."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

INSTRUCTION = "You are a calculator."
EXAMPLE = ("Calculate 9 + 12.", "9 + 12 = 21")
"""A worked example. With it 41 to 43 % of SmolLM2-135M-Instruct's samples are right (128 samples of two seeds each,
temperature 1), and 11 of 16 groups of eight hold both right and wrong ones; without one, about 15 % are right."""

_NUMBER = r"(?:(?<!\d)[-+])?\d[\d,]*(?:\.\d+)?"  # the 2 of 9-2 has no sign


@dataclass(frozen=True)
class Question:
    """A question, its gold answer as the example writes it, and the entry that the verifier needs."""

    text: str
    gold: str
    entry: dict[str, Any]


class Questions:
    """A supply of sums of two numbers of one or two digits, and their verifier.

    Args:
        seed: the same seed gives the same questions.
    """

    def __init__(self, seed: int) -> None:
        import reasoning_gym

        self._dataset = reasoning_gym.create_dataset(
            "basic_arithmetic",
            seed=seed,
            size=10**6,
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=2,
            operators=["+"],
            allow_parentheses=False,
            allow_negation=False,
        )
        self._drawn = 0

    def draw(self, n: int) -> list[Question]:
        """The next ``n`` questions."""
        entries = [self._dataset[i] for i in range(self._drawn, self._drawn + n)]
        self._drawn += n
        return [Question(e["question"], f"{e['metadata']['expression']} = {e['answer']}", e) for e in entries]

    def verdict(self, question: Question, completion: str) -> float:
        """The rule reward I(o): 1 when the dataset's verifier accepts the answer in a completion, else 0.

        Partial credit of the verifier counts as 0.
        """
        answer = extract_answer(completion)
        return float(answer is not None and self._dataset.score_answer(answer, question.entry) >= 1)


def extract_answer(completion: str) -> str | None:
    """The number that a completion gives as its result: the one after the last ``=``, else its last number.

    Written as an integer where it is one: ``1,204.0`` is ``1204``. None when there is no number.
    """
    numbers = re.findall(rf"=\s*\**\s*({_NUMBER})", completion) or re.findall(_NUMBER, completion)
    if not numbers:
        return None
    number = numbers[-1].replace(",", "").removeprefix("+")
    whole, _, fraction = number.partition(".")
    return number if fraction.strip("0") else str(int(whole))


def prompt_tokens(tokenizer: Any, question: Question) -> list[int]:
    """The prompt: an instruction, a worked example and the question, in the model's chat format."""
    shown, answer = EXAMPLE
    if tokenizer.chat_template is None:
        text = f"{INSTRUCTION}\n{shown} {answer}\n{question.text} "
        return list(tokenizer(text).input_ids)
    turns = [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question.text},
    ]
    system = [{"role": "system", "content": INSTRUCTION}]
    # Models that can think aloud are asked not to: the answer has to fit into a few tokens.
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(system + turns, **options)
    except TemplateError:  # a template without a system role
        text = tokenizer.apply_chat_template(turns, **options)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
