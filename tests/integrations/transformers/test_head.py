"""A model with a fused head is still the model: arguments, generation, signature, copies, files, and back."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unirl_kernels as uk
from tests.integrations.transformers.models import B, L, V, own_and_exact, tiny, tokens, within_budget
from unirl_kernels.integrations.transformers import FusedHead


def test_what_a_call_returns_beside_the_loss() -> None:
    model, inputs = tiny(), tokens()
    own, exact = own_and_exact(model, inputs)
    plain = model(**inputs, output_hidden_states=True, use_cache=True)
    with FusedHead(model, uk.Plan(max_chunk_bytes=4 * V * 5)):
        out = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], output_hidden_states=True)
    within_budget({"loss": out.loss}, {"loss": own["loss"]}, {"loss": exact["loss"]})
    (cache,) = {"cache", "past_key_values"} & set(out)
    assert out[cache].get_seq_length() == L
    assert set(out) == set(plain) - {"logits"}
    assert len(out.hidden_states) == len(plain.hidden_states)
    assert all(torch.equal(x, y) for x, y in zip(out.hidden_states, plain.hidden_states, strict=True))


def test_no_name_that_transformers_gives_up_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda logger, text, *args: said.append(text))
    model, inputs = tiny(), tokens()
    with warnings.catch_warnings(), FusedHead(model):
        warnings.simplefilter("error", FutureWarning)
        model(**inputs, use_cache=True)
    assert not [text for text in said if "deprecated" in text]


def test_calls_without_labels_are_the_models_own() -> None:
    model, inputs = tiny().eval(), tokens()
    del inputs["labels"]
    own, prompt = model(**inputs), inputs["input_ids"][:1]
    sample = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    said = model.generate(prompt, **sample)
    with FusedHead(model):
        assert torch.equal(model(**inputs).logits, own.logits)
        assert torch.equal(model(**inputs, return_dict=False)[0], own.logits)
        assert model(**inputs, logits_to_keep=1).logits.shape == (B, 1, V)
        assert torch.equal(model.generate(prompt, **sample), said)


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("return_dict", False, "True"),
        ("logits_to_keep", 1, "0"),
        ("logits_to_keep", torch.arange(2), "0"),
        ("output_router_logits", True, "False"),
    ],
)
def test_arguments_that_ask_for_something_else_are_refused(name: str, value: Any, harmless: str) -> None:
    model, inputs = tiny(), tokens()
    with FusedHead(model), pytest.raises(ValueError, match=f"^{name} must be {harmless} where labels are given"):
        model(**inputs, **{name: value})


def test_configuration_that_asks_for_a_tuple_is_refused() -> None:
    model, inputs = tiny(), tokens()
    with FusedHead(model):
        model.config.return_dict = False
        with pytest.raises(ValueError, match=r"^return_dict must be True"):
            model(**inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite", "Phi"])
def test_other_logits_are_refused(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        for model in (tiny(family), tiny(family, vocab_size=3000, tie_word_embeddings=True)):
            with FusedHead(model.to(dtype)):
                pass
    model = tiny(family).to(dtype)
    own = type(model).forward
    largest = 2 if family == "Gemma2" else 64
    some = torch.arange(V) % 5 == 0
    changes: list[Callable[[Tensor], Tensor]] = [lambda x, c=c: x * c for c in (0.9, 0.98, 1.02, 1.1)]
    changes += [lambda x, c=c: c * largest * torch.tanh(x / (c * largest)) for c in (1, 2)]
    changes += [lambda x: x + 0.05 * largest * some]
    for change in changes:

        def changed(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
            out = own(self, *args, **kwargs)
            out.logits = change(out.logits)  # noqa: B023 - called in this round alone
            out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=V)
            return out

        monkeypatch.setattr(type(model), "forward", changed)
        with pytest.raises(ValueError, match="logits must be those of its output layer"):
            FusedHead(model)


@pytest.mark.parametrize("what", ["router", "loss_function", "softcap"])
def test_a_model_that_changes_afterwards_is_refused(what: str) -> None:
    model, inputs = tiny("Gemma2"), tokens()
    with FusedHead(model):
        model(**inputs)
        if what == "router":
            model.config.output_router_logits = True
        elif what == "loss_function":
            model.loss_function = lambda **_: torch.zeros(())
        else:
            model.config.final_logit_softcapping = None
        with pytest.raises(ValueError, match="under a fused head"):
            model(**inputs)


def test_undo_restores() -> None:
    model, inputs = tiny(), tokens()
    signature = inspect.signature(model.forward)
    fused = FusedHead(model)
    assert model.training
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="has LlamaForCausalLM a fused head already"):
        FusedHead(model)
    fused.undo()
    fused.undo()
    assert "forward" not in vars(model)
    assert not model.model._forward_hooks
    assert model(**inputs).logits is not None


def test_undo_under_another_wrapper() -> None:
    """A forward that was the instance's is put back; one that was put around the head's stays, without the head."""
    model, inputs = tiny(), tokens()
    own, calls = model.forward, []
    model.forward = first = lambda *args, **kwargs: calls.append("first") or own(*args, **kwargs)
    with FusedHead(model):
        calls.clear()
        assert model(**inputs).logits is None
        assert not calls
    assert model.forward is first
    fused = FusedHead(model)
    inner = model.forward
    model.forward = second = lambda *args, **kwargs: inner(*args, **kwargs)
    assert model(**inputs).logits is None
    fused.undo()
    assert model.forward is second
    assert model(**inputs).logits is not None


def test_copy_of_a_model_runs_the_copy() -> None:
    """A reference model is made by copying; with parameters of its own it must have losses of its own."""
    model, inputs = tiny(), tokens()
    with FusedHead(model):
        other = copy.deepcopy(model)
        assert other.forward.__self__ is other
        nn.init.zeros_(other.lm_head.weight)
        out = other(**inputs)
        assert out.logits is None
        assert out.loss.item() == pytest.approx(torch.tensor(V).log().item())
        assert not other(**{**inputs, "labels": None}).logits.any()
    assert not other(**inputs).logits.any()


def replicate(model: Any) -> Any:
    """As DataParallel does it, with parameters that can be told apart: torch.nn.parallel.replicate wants GPUs."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else torch.zeros_like(parameter))
    return replicas[model]


def test_replica_of_data_parallel_runs_itself() -> None:
    model, inputs = tiny(), tokens()
    fused = FusedHead(model)
    replica = replicate(model)
    out = replica(**inputs, num_items_in_batch=torch.tensor([[7]]))
    assert out.logits is None
    counted = int((inputs["labels"][:, 1:] != -100).sum())
    assert out.loss.item() == pytest.approx(torch.tensor(V).log().item() * counted / 7)
    fused.undo()
    assert "_replicate_for_data_parallel" not in vars(model)
    assert replicate(model)(**inputs).logits is not None


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickled_model_is_the_plain_one(way: str) -> None:
    model, inputs = tiny(), tokens()
    logits = model(**inputs).logits
    file = io.BytesIO()
    with FusedHead(model):
        pickle.dump(model, file) if way == "pickle" else torch.save(model, file)
    file.seek(0)
    loaded = pickle.load(file) if way == "pickle" else torch.load(file, weights_only=False)
    assert torch.equal(loaded(**inputs).logits, logits)
    nn.init.zeros_(loaded.lm_head.weight)
    assert not loaded(**inputs).logits.any()
    assert loaded.forward.__self__ is loaded


def test_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model, inputs = tiny(), tokens()
    own = model(**inputs)
    with FusedHead(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(loaded(**inputs).logits, own.logits)


def test_one_graph_under_compile() -> None:
    model, inputs = tiny(), tokens()
    own, exact = own_and_exact(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with FusedHead(model):
        out = compiled(**inputs)
        assert out.logits is None
    within_budget({"loss": out.loss}, {"loss": own["loss"]}, {"loss": exact["loss"]})
    assert compiled(**inputs).logits.shape == (B, L, V)
