"""The loss head of a trainer of TRL three ways: ``python -m benchmarks.trl_head --trainer dpo --out FILE.json``.

TRL's own, ``integrations.trl.patch()`` and ``integrations.trl.fuse(trainer)``, on the same micro-batch. The model
has no layers: what is measured is a trainer's ``compute_loss`` and ``backward`` from hidden states on. Rounds are
interleaved; memory is of a process for each way. References of DPO and KTO are precomputed; KTO's estimate of the KL
divergence, a pass without a gradient, is part of every way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import hardware
from benchmarks.arguments import at_least
from benchmarks.measure import interleaved_times, peak_extra_bytes
from benchmarks.memory import CHECKOUT, KEEP_NOTHING

WAYS = ("trl", "patch", "fuse")
PROMPT = 8
TRAINERS = {"grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO", "kto": "KTO", "sft": "SFT"}
REFERENCE = -8.0
"""Log-probability of a token under references that are given, about that of V = 49152 equal words."""


class Head:
    """A micro-batch, and the trainer that computes its loss.

    Args:
        options: sizes.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trainer = _trainer(options)
        self.model = self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.inputs = self._inputs()

    def _inputs(self) -> dict[str, Tensor]:
        sequences, length, vocab = self.options.sequences, self.options.length, self.options.vocab
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(vocab, (sequences, PROMPT + length), generator=random)
        mask = torch.ones_like(ids)
        if self.options.trainer in ("grpo", "rloo"):
            return self._completions(ids, mask, random)
        completions = (torch.arange(PROMPT + length) >= PROMPT).long().expand_as(ids)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.options.trainer == "sft":
            return {**inputs, "labels": ids.masked_fill(completions == 0, -100)}
        inputs["completion_mask"] = completions
        references = length * (REFERENCE + 0.1 * torch.randn(sequences, generator=random))
        if self.options.trainer == "dpo":
            chosen, rejected = references.chunk(2)
            return {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        of_kl = {f"KL_{name}": x.roll(1, 0) for name, x in inputs.items()}
        label = torch.arange(sequences) % 2 == 0
        return {**inputs, **of_kl, "label": label, "ref_logps": references, "ref_KL_logps": references.roll(1)}

    def _completions(self, ids: Tensor, mask: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        sequences, length = self.options.sequences, self.options.length
        with torch.no_grad():
            logp, *_ = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, length, 1)
        inputs = {
            "prompt_ids": ids[:, :PROMPT],
            "prompt_mask": mask[:, :PROMPT],
            "completion_ids": ids[:, PROMPT:],
            "completion_mask": mask[:, PROMPT:],
            "advantages": torch.randn(sequences, generator=random),
        }
        noise = 0.1 * torch.randn(2, sequences, length, generator=random)
        if self.options.trainer == "rloo":
            return {**inputs, "old_logps": (logp + 0.1 * noise[0]).sum(1)}
        return {
            **inputs,
            "old_per_token_logps": logp + noise[0],
            "ref_per_token_logps": logp + noise[1],
            "num_items_in_batch": torch.tensor(sequences * length),
        }

    def step(self, way: str) -> Callable[[], tuple[float, float]]:
        """A call that makes loss and gradient and returns both, the gradient by its norm."""
        from unirl_kernels.integrations import trl

        def call() -> tuple[float, float]:
            if way == "patch":
                trl.patch()
            elif way == "fuse":
                trl.fuse(self.trainer)
            try:
                loss = self.trainer.compute_loss(self.model, dict(self.inputs))
                loss.backward()
            finally:
                trl.unfuse(self.trainer)
                trl.unpatch()
            weight = self.model.lm_head.weight
            norm = weight.grad.norm().item()
            self.model.zero_grad(set_to_none=True)
            return loss.item(), norm

        return call


def _trainer(options: argparse.Namespace) -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import transformers
    import trl
    from tokenizers import Tokenizer, models

    tokens = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden,
        num_hidden_layers=0,
        num_attention_heads=1,
        vocab_size=options.vocab,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    folder = tempfile.mkdtemp(prefix="trl_head")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)  # where the trainer finds a reference model
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.embed_tokens.weight.requires_grad_(False)
    kind = TRAINERS[options.trainer]
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=folder,
        report_to=[],
        use_cpu=True,
        bf16=options.dtype == "bf16",
        activation_checkpointing=False,
        per_device_train_batch_size=options.sequences,
        **_options(options),
    )
    given: dict[str, Any] = {"reward_funcs": lambda **_: []} if options.trainer in ("grpo", "rloo") else {}
    rows = datasets.Dataset.from_dict(ROWS[options.trainer]).select([0] * options.sequences)
    trainer = getattr(trl, f"{kind}Trainer")(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, **given
    )
    trainer.ref_model = None
    return trainer


ANSWER = {"prompt": ["<pad>"], "completion": ["<eos>"]}
ROWS: dict[str, dict[str, list[Any]]] = {
    "grpo": {"prompt": ["<pad>"]},
    "rloo": {"prompt": ["<pad>"]},
    "dpo": {"prompt": ["<pad>"], "chosen": ["<eos>"], "rejected": ["<pad>"]},
    "kto": {**ANSWER, "label": [True]},
    "sft": ANSWER,
}
"""What a trainer has to be given; the micro-batch is another."""


def _options(options: argparse.Namespace) -> dict[str, Any]:
    """Of the trainer's configuration."""
    if options.trainer in ("dpo", "kto"):
        return {"precompute_ref_log_probs": True}
    if options.trainer == "sft":
        return {}
    found = {"beta": 0.04, "num_generations": options.sequences, "max_completion_length": options.length}
    return found | ({"loss_type": options.loss} if options.trainer == "grpo" else {})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Check that all ways agree, then time them, then measure their memory."""
    head = Head(options)
    calls = {way: head.step(way) for way in WAYS}
    values = {way: call() for way, call in calls.items()}
    elsewhere = hardware.Elsewhere()
    times = interleaved_times(calls, torch.device("cpu"), rounds=options.rounds)
    share = elsewhere.share()
    sizes = {
        name: getattr(options, name) for name in ("trainer", "sequences", "length", "hidden", "vocab", "dtype", "loss")
    }
    return {
        "command": " ".join(["python -m benchmarks.trl_head", *sys.argv[1:]]),
        "date": hardware.now(),
        "commit": hardware.commit(),
        "versions": hardware.versions(),
        "hardware": hardware.hardware(torch.device("cpu")),
        "work": sizes,
        "rounds": options.rounds,
        "elsewhere": share,
        "loss_and_gradient_norm": values,
        "seconds": {way: asdict(time) for way, time in times.items()},
        "peak_extra_bytes": {way: _peak(way) for way in WAYS},
        "fuse_by_patch": times["fuse"].median / times["patch"].median,
        "fuse_by_trl": times["fuse"].median / times["trl"].median,
    }


def _peak(way: str) -> int:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trl_head", *sys.argv[1:], "--memory-of", way]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=CHECKOUT, env=os.environ | KEEP_NOTHING, check=True
    )
    return int(done.stdout.split()[-1])


def table(found: Mapping[str, Any]) -> str:
    """The record in Markdown."""
    lines = ["| way | ms | by patch | peak MB |", "| --- | ---: | ---: | ---: |"]
    seconds, peaks = found["seconds"], found["peak_extra_bytes"]
    for way in WAYS:
        median = seconds[way]["median"]
        ratio = median / seconds["patch"]["median"]
        lines.append(f"| {way} | {1e3 * median:.0f} | {ratio:.2f} | {peaks[way] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--trainer", choices=tuple(TRAINERS), default="grpo", help="of TRL")
    add("--sequences", type=at_least(2), default=4, help="of the micro-batch")
    add("--length", type=at_least(1), default=256, help="of a completion")
    add("--hidden", type=at_least(1), default=576, help="size of a hidden state; SmolLM2-135M's")
    add("--vocab", type=at_least(2), default=49152, help="size of the vocabulary; SmolLM2's")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matmuls' operands; bf16 by autocast")
    add("--loss", default="dapo", help="GRPOConfig.loss_type; of GRPO alone")
    add("--rounds", type=at_least(2), default=9, help="timed calls of each way")
    add("--out", type=Path, metavar="FILE.json", help="where to save the record")
    add("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        call = Head(options).step(options.memory_of)
        call()
        sys.stdout.write(f"{peak_extra_bytes(call, torch.device('cpu'))}\n")
        return
    found = measure(options)
    sys.stdout.write(table(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
