"""A tokenizer and tiny causal language models for TRL's trainers, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = [
    "the cat sat on the mat and looked at the moon",
    "a dog ran over the hill to the old house by the sea",
    "two birds sang in the tall green tree at noon",
    "she read the book twice and gave it to her friend",
    "rain fell on the roof while the children slept",
    "he counted seven boats and one red kite",
    "bread",
    "the road to the town is long and the wind is cold tonight",
]
CHAT = "{% for turn in messages %}{{ turn['content'] }}\n{% endfor %}"
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "softcap": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"final_logit_softcapping": 5.0, "head_dim": 8, "attn_implementation": "eager"},
    ),
    "scale": (transformers.CohereConfig, transformers.CohereForCausalLM, {"logit_scale": 0.25}),
}


def byte_pairs() -> Any:
    """Of bytes, so that whatever a model samples is a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    words = {"pad_token": "<pad>", "eos_token": "<eos>", "chat_template": CHAT}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **words)


def save(family: str, folder: Path) -> None:
    """A model that knows the sentences a little, and its tokenizer, where trainers find them for a reference model."""
    tokenizer = byte_pairs()
    config, model_of, options = FAMILIES[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    words = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(1)
    model = model_of(config(**sizes, **heads, **words, **options))
    acquaint(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(family: str, folder: Path) -> Any:
    return FAMILIES[family][1].from_pretrained(folder, dtype=torch.float32)


def acquaint(model: Any, tokenizer: Any) -> None:
    """Let a model read the sentences a few times, until it gets some tokens right."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(15):
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
