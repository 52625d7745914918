"""Losses on hidden states equal those on the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the demo's extras are not installed")

import unirl_kernels as uk
from examples.demo import head
from examples.demo.head import NotLinear, head_of, readout_of
from examples.demo.model import LanguageModel, load_model, locate
from examples.demo.sampling import Sampler, Samples
from tests.demo.cases import CPU, PLAN, six_sources

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}


def _network(name: str, **settings: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS, **settings)
    network = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if (bias := getattr(network.lm_head, "bias", None)) is not None:
        nn.init.normal_(bias)
    return network


@pytest.mark.parametrize(
    ("name", "settings", "readout"),
    [
        ("Llama", {}, (None, 1.0)),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}, (3.0, 1.0)),
        ("Cohere", {"logit_scale": 0.0625}, (None, 0.0625)),
        ("Granite", {"logits_scaling": 8.0}, (None, 0.125)),  # divides
        ("HyperCLOVAX", {"logits_scaling": 8.0}, (None, 8.0)),  # multiplies
        ("Phi", {}, (None, 1.0)),  # has a bias
    ],
)
def test_heads_of_models_are_found_out(name: str, settings: dict[str, Any], readout: tuple[Any, float]) -> None:
    network = _network(name, **settings)
    found = readout_of(network)
    assert (found.softcap, found.scale) == readout
    ids = torch.randint(1, 97, (2, 7))
    target = torch.randint(0, 97, (2, 7))
    with torch.no_grad():
        hidden = network.get_decoder()(input_ids=ids).last_hidden_state
        stats = head_of(network, found, torch.float32).token_stats(hidden, target, PLAN)
        expected = uk.token_stats(network(input_ids=ids).logits, target, plan=PLAN)
    torch.testing.assert_close(stats, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["one logit", "scale", "decoder"])
def test_a_head_that_is_more_than_a_matmul_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network("Llama")
    if change == "decoder":
        monkeypatch.setattr(type(network), "get_decoder", lambda self: self)
    else:
        factor = torch.ones(97)
        factor[5 if change == "one logit" else slice(None)] = 1.001
        network.lm_head.register_forward_hook(lambda module, given, logits: logits * factor)
    with pytest.raises(NotLinear, match="hidden states"):
        readout_of(network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_log_probs_are_those_of_the_logits(
    folder: Path, sampler: Sampler, samples: Samples, dtype: torch.dtype
) -> None:
    linear = load_model(locate(str(folder)), CPU, dtype)
    assert linear.head is not None
    on_logits = LanguageModel(linear.network, CPU, dtype)
    assert on_logits.head is None
    # bf16 logits are rounded, those of the head are not
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    log_probs = [model.log_probs(samples.sequences, PLAN) for model in (linear, on_logits)]
    torch.testing.assert_close(*log_probs, **close)
    source = six_sources(linear, sampler, samples)[5]

    def gradients(model: LanguageModel) -> list[Tensor]:
        model.network.zero_grad()
        out = model.loss(source.sequences, source.batch, source.loss, PLAN)
        out.loss.backward()
        return [out.loss.detach(), *(p.grad.clone() for p in model.network.parameters())]

    for got, expected in zip(gradients(linear), gradients(on_logits), strict=True):
        difference = (got - expected).norm() / expected.norm().clamp(min=1e-3)
        assert difference < (1e-3 if dtype == torch.float32 else 0.1)


def test_losses_on_hidden_states_make_no_logits_of_all_tokens(
    model: LanguageModel, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    model.network.lm_head.register_forward_hook(lambda module, given, logits: made.append(logits.shape[-2]))
    monkeypatch.setattr(head, "linear", None)
    model.log_probs(samples.sequences, PLAN)
    model.loss(samples.sequences, uk.Batch(samples.sequences.target), uk.sft(), PLAN).loss.backward()
    assert set(made) == {1}  # the cached prompts' last tokens
