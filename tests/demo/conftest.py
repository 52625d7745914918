"""A tiny random model that is made here: no download is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.demo.model import LanguageModel, load_model, load_tokenizer, locate
from examples.demo.questions import Questions
from examples.demo.sampling import Sampler, Samples
from tests.demo.cases import CPU, VOCAB


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights and a tokenizer of bytes, as ``save_pretrained`` leaves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<end>", *letters])}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, bos_token_id=None, eos_token_id=0, initializer_range=0.2, **sizes, **heads)
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return load_model(locate(str(folder)), CPU, torch.float32)


@pytest.fixture
def sampler(folder: Path) -> Sampler:
    tokenizer = load_tokenizer(locate(str(folder)))
    return Sampler(tokenizer, Questions(0), 4, 6, torch.Generator().manual_seed(0))


@pytest.fixture
def samples(model: LanguageModel, sampler: Sampler) -> Samples:
    """Samples of three questions; the verdicts are made up: a random model never gets one right."""
    drawn = sampler.samples(model, sampler.questions.draw(3))
    verdicts = torch.tensor([0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1], dtype=torch.float32)
    return Samples(drawn.sequences, drawn.texts, verdicts, drawn.group)
