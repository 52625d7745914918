"""What a configuration for GRPO names: how a row becomes a prompt, and what an answer is worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def prompts(cfg: Any, *args: Any, **kwargs: Any) -> Callable[..., dict[str, str]]:
    def prompt(row: dict[str, str], tokenizer: Any = None) -> dict[str, str]:
        return {"prompt": row["prompt"]}

    return prompt


def vowels(prompts: list[str], completions: list[str], **rest: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]
