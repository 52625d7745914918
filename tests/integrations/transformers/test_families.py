"""Models that lose their logits: families, adapters, and what is refused because its loss would be another."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.transformers.models import (
    FAMILIES,
    SIZES,
    V,
    adapted,
    cancelling,
    loss_and_gradients,
    own_and_exact,
    tiny,
    tokens,
    transformers,
    within_budget,
)
from unirl_kernels.integrations.transformers import FusedHead, readout_of

from transformers.loss.loss_utils import ForCausalLMLoss  # isort: skip


def check_model(model: Any, fused: Any = None, **more: Any) -> None:
    """With a fused head a model has its own loss and gradients, and no logits."""
    inputs = {**tokens(), **more}
    own, exact = own_and_exact(model, inputs)
    with FusedHead(model if fused is None else fused):
        within_budget(loss_and_gradients(model, inputs, logits=False), own, exact, cancelling(exact))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_head_of_a_family(family: str) -> None:
    check_model(tiny(family))


def test_fused_head_of_tied_embeddings() -> None:
    model = tiny("Qwen3", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_model(model)


def test_fused_head_of_a_model_that_sees_images() -> None:
    image, sizes = V - 1, {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    parts = {"vision_config": vision, "text_config": transformers.LlamaConfig(**SIZES)}
    config = transformers.LlavaConfig(**parts, image_token_index=image)
    model, inputs = transformers.LlavaForConditionalGeneration(config), tokens()
    ids = inputs["input_ids"].clamp(max=image - 1)
    ids[0, 1:5] = image
    labels = ids.masked_fill((ids == image) | (inputs["attention_mask"] == 0), -100)
    check_model(model, input_ids=ids, labels=labels, pixel_values=torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]], ids=len)
def test_fused_head_of_an_adapted_model(targets: list[str]) -> None:
    model = adapted(tiny(), *targets)
    check_model(model)
    check_model(model, model.get_base_model())


def test_what_reaches_loss_and_backbone() -> None:
    model = tiny()
    check_model(model, num_items_in_batch=torch.tensor(40), use_cache=False)
    check_model(model, position_ids=torch.arange(7).flip(0).expand(3, 7))
    check_model(model, shift_labels=tokens()["labels"])


@pytest.mark.parametrize(
    ("config", "softcap", "scale"),
    [
        ({}, None, 1.0),
        ({"final_logit_softcapping": None, "logit_scale": None}, None, 1.0),
        ({"logits_soft_cap": 30}, 30.0, 1.0),
        ({"output_logit_soft_cap": 15.0}, 15.0, 1.0),
        ({"output_multiplier": 0.5, "final_logit_softcapping": 20.0}, 20.0, 0.5),
        ({"lm_head_multiplier": 0.5}, None, 0.5),
        ({"logits_mup_width_multiplier": 4.0}, None, 0.25),
        ({"logits_scaling": 4.0, "model_type": "granite"}, None, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, None, 4.0),
    ],
    ids=str,
)
def test_how_logits_become_a_distribution(config: dict[str, Any], softcap: float | None, scale: float) -> None:
    readout = readout_of(SimpleNamespace(**config))
    assert (readout.softcap, readout.scale) == (softcap, scale)


def test_readout_of_a_model_that_holds_its_text_model() -> None:
    assert readout_of(tiny("Gemma2").config).softcap == 2.0
    text = SimpleNamespace(logit_scale=0.25)
    assert readout_of(SimpleNamespace(get_text_config=lambda: text)).scale == 0.25


def of_llama(forward: Callable[..., Any]) -> Any:
    model = tiny()
    made = type("Changed", (type(model),), {"forward": forward})
    model.__class__ = made
    return model


def with_logits(change: Callable[[Tensor], Tensor]) -> Any:
    def forward(self: Any, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = transformers.LlamaForCausalLM.forward(self, input_ids, **kwargs)
        out.logits = change(out.logits)
        out.loss = None if labels is None else self.loss_function(out.logits, labels, out.logits.shape[-1])
        return out

    return of_llama(forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_are_made_otherwise_are_refused(dtype: torch.dtype) -> None:
    with FusedHead(with_logits(lambda x: x).to(dtype)):
        pass
    message = r"model's logits must be those of its output layer with Readout\(.*\); Changed makes others"
    for change in (lambda x: 1.5 * x, lambda x: 30 * torch.tanh(x / 30), lambda x: x[..., :-1], lambda x: x + x.sum()):
        model = with_logits(change).to(dtype)
        with pytest.raises(ValueError, match=message):
            FusedHead(model)
        assert "forward" not in vars(model)
        assert not model.model._forward_hooks


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_scaling"])
def test_configuration_that_the_model_does_not_follow_is_refused(name: str) -> None:
    model = tiny(**{name: 4.0})
    with pytest.raises(ValueError, match="LlamaForCausalLM makes others"):
        FusedHead(model)


def test_another_loss_is_refused() -> None:
    message = r"loss must be the mean of -log pi over the labels; LlamaForCausalLM makes"
    losses: dict[str, Callable[..., Tensor]] = {
        "twice": lambda logits, labels, **_: 2 * ForCausalLMLoss(logits, labels, V),
        "unshifted": lambda logits, labels, **_: ForCausalLMLoss(logits, None, V, shift_labels=labels),
    }
    for loss in losses.values():
        model = tiny()
        model.loss_function = loss
        with pytest.raises(ValueError, match=message):
            FusedHead(model)


def test_loss_that_looks_at_the_mask_is_refused() -> None:
    """As that of Qwen2-Audio, which leaves out labels at masked places."""

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        if labels is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return transformers.LlamaForCausalLM.forward(self, input_ids, attention_mask, labels=labels, **rest)

    with pytest.raises(ValueError, match="loss must be the mean of -log pi over the labels; Changed makes another"):
        FusedHead(of_llama(forward))


def test_models_that_are_not_a_backbone_and_an_output_layer_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a backbone and an output layer, got LlamaModel"):
        FusedHead(tiny().model)
    sizes = {"ffn_dim": 16, "word_embed_proj_dim": 16}
    with pytest.raises(TypeError, match="must run its base_model and an output layer; OPTForCausalLM calls something"):
        FusedHead(transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **sizes)))
    wider = tiny()
    wider.lm_head = torch.nn.Linear(17, V)
    with pytest.raises(ValueError, match="output layer must take hidden states of 16, got 17"):
        FusedHead(wider)


def test_loss_of_a_router_is_refused() -> None:
    model = tiny()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"router's loss .* set config\.output_router_logits to False"):
        FusedHead(model)
