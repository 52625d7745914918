"""The loss head of a trainer of TRL three ways: ``python -m benchmarks.trl_head --trainer dpo --out FILE.json``.

TRL's own, ``integrations.trl.patch()`` and ``integrations.trl.fuse(trainer)``, on the same micro-batch. The model
has no layers: what is measured is a trainer's ``compute_loss`` and ``backward`` from hidden states on. Rounds are
interleaved; memory is of a process for each way. References of DPO and KTO are precomputed; KTO's estimate of the KL
divergence, a pass without a gradient, is part of every way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.trainer_heads import run

WAYS = ("trl", "patch", "fuse")
PROMPT = 8
TRAINERS = {"grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO", "kto": "KTO", "sft": "SFT"}
REFERENCE = -8.0
"""Log-probability of a token under references that are given, about that of V = 49152 equal tokens."""


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


def main() -> None:
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--trainer", choices=tuple(TRAINERS), default="grpo", help="of TRL")
        parser.add_argument("--loss", default="dapo", help="GRPOConfig.loss_type; of GRPO alone")

    run("trl_head", __doc__, WAYS, Head, add_options)


if __name__ == "__main__":
    main()
