"""transformers' causal language models: the loss function beside theirs, and models that lose their logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unirl_kernels as uk
from unirl_kernels.accuracy import violations

transformers = pytest.importorskip("transformers")

from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

from unirl_kernels.integrations.transformers import FusedHead, causal_lm_loss, readout_of  # noqa: E402

B, L, V = 3, 7, 53
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 2.0, "tie_word_embeddings": True},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},
}


def tiny(family: str = "Llama", **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    if (bias := model.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    return model


def tokens() -> dict[str, Tensor]:
    """Sequences with padding on the right and prompts that do not count."""
    ids = torch.randint(3, V, (B, L))
    mask = torch.arange(L) < torch.tensor([[7], [5], [3]])
    labels = ids.masked_fill(~mask, -100)
    labels[0, :2] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding in another order, of the largest of them."""
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6 * max(1e-3, float(wanted.detach().abs().max())))


def check_model(model: Any, fused: Any = None, **more: Any) -> None:
    """With a fused head a model has its own loss and gradients, and no logits."""
    inputs = {**tokens(), **more}
    own = model(**inputs)
    expected = gradients(model, own.loss)
    with FusedHead(model if fused is None else fused):
        out = model(**inputs)
        assert out.logits is None
        close(out.loss, own.loss)
        got = gradients(model, out.loss)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        close(got[name], gradient)


CALLS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "labels": lambda labels: {"labels": labels},
    "int_count": lambda labels: {"labels": labels, "num_items_in_batch": 29},
    "tensor_count": lambda labels: {"labels": labels, "num_items_in_batch": torch.tensor(29)},
    "ignore_index": lambda labels: {"labels": labels.masked_fill(labels == -100, 5), "ignore_index": 5},
    "shift_labels": lambda labels: {"labels": None, "shift_labels": labels, "num_items_in_batch": torch.tensor(7)},
    "both": lambda labels: {"labels": labels.flip(0), "shift_labels": labels, "an_unknown": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_loss_is_that_of_transformers(call: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(B, L, V)).to(dtype)
    arguments = CALLS[call](tokens()["labels"])

    def of(function: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        loss = function(x, vocab_size=V, **arguments)
        return [loss, *torch.autograd.grad(loss, x)]

    ours, plain = of(causal_lm_loss, logits), of(ForCausalLMLoss, logits)
    assert [x.dtype for x in ours] == [torch.float32, dtype]
    exact = logits.double()
    # Theirs converts its logits to float32: the truth is their formula on logits that are float64 from the start.
    truth = of(lambda x, **kwargs: ForCausalLMLoss(SimpleNamespace(float=lambda: x), **kwargs), exact)
    for x, theirs, wanted in zip(ours, plain, truth, strict=True):
        assert not violations(x.detach(), theirs.detach(), wanted.detach())


def test_loss_refuses_what_does_not_fit() -> None:
    logits, labels = torch.randn(B, L, V), tokens()["labels"]
    with pytest.raises(ValueError, match=rf"logits must have {V + 1} columns \(vocab_size\), got {V}"):
        causal_lm_loss(logits, labels, V + 1)
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        causal_lm_loss(logits, None, V)
    with pytest.raises(ValueError, match="count must be positive, got 0"):
        causal_lm_loss(logits, labels, V, num_items_in_batch=0)
    assert causal_lm_loss(logits, torch.full_like(labels, -100), V) == 0


def test_loss_function_of_a_model() -> None:
    model, inputs = tiny(), tokens()
    own = model(**inputs, num_items_in_batch=31)
    expected = gradients(model, own.loss)
    model.loss_function = causal_lm_loss
    out = model(**inputs, num_items_in_batch=31)
    close(out.loss, own.loss)
    assert torch.equal(out.logits, own.logits)
    for name, gradient in gradients(model, out.loss).items():
        close(gradient, expected[name])
    with FusedHead(model):
        close(model(**inputs, num_items_in_batch=31).loss, own.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_head_of_a_family(family: str) -> None:
    check_model(tiny(family))


def test_fused_head_of_tied_embeddings() -> None:
    model = tiny("Qwen3", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_model(model)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]], ids=len)
def test_fused_head_of_an_adapted_model(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    check_model(model)
    check_model(model, model.get_base_model())


def test_how_logits_become_a_distribution() -> None:
    assert readout_of(SimpleNamespace(output_multiplier=0.5)).scale == 0.5
    assert readout_of(SimpleNamespace(logits_scaling=4.0, model_type="granite")).scale == 0.25
    assert readout_of(SimpleNamespace(logits_scaling=4.0, model_type="hyperclovax")).scale == 4.0
    assert readout_of(tiny("Gemma2").config).softcap == 2.0


def test_what_the_head_is_given_reaches_the_loss_and_the_backbone() -> None:
    model = tiny()
    check_model(model, num_items_in_batch=torch.tensor(40), use_cache=False)
    check_model(model, position_ids=torch.arange(L).flip(0).expand(B, L))
    check_model(model, shift_labels=tokens()["labels"])
    inputs = tokens()
    own = model(**inputs, output_hidden_states=True, use_cache=True)
    with FusedHead(model, uk.Plan(max_chunk_bytes=4 * V * 5)):
        out = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], output_hidden_states=True)
    close(out.loss, own.loss)
    assert out.past_key_values is not None
    assert len(out.hidden_states) == len(own.hidden_states)
    assert all(torch.equal(x, y) for x, y in zip(out.hidden_states, own.hidden_states, strict=True))


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
    model, inputs = tiny(), tokens()
    with FusedHead(model):
        other = copy.deepcopy(model)
        nn.init.zeros_(other.lm_head.weight)
        close(other(**inputs).loss, torch.tensor(float(V)).log())
        close(other(**{**inputs, "labels": None}).logits, torch.zeros(B, L, V))


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


def test_another_loss_is_refused() -> None:
    model = tiny()
    model.loss_function = lambda logits, labels, **_: 2 * ForCausalLMLoss(logits, labels, V)
    with pytest.raises(ValueError, match=r"loss must be the mean of -log pi over the labels; LlamaForCausalLM makes"):
        FusedHead(model)


def test_models_and_arguments_that_are_not_known_are_refused() -> None:
    model, inputs = tiny(), tokens()
    with pytest.raises(TypeError, match="must be a backbone and an output layer, got LlamaModel"):
        FusedHead(model.model)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"router's loss .* set config\.output_router_logits to False"):
        FusedHead(model)
    model.config.output_router_logits = False
    with FusedHead(model):
        for name, value, harmless in (
            ("return_dict", False, "True"),
            ("logits_to_keep", 1, "0"),
            ("logits_to_keep", torch.arange(2), "0"),
            ("output_router_logits", True, "False"),
        ):
            with pytest.raises(ValueError, match=f"^{name} must be {harmless} where labels are given"):
                model(**inputs, **{name: value})
        model.config.return_dict = False
        with pytest.raises(ValueError, match=r"^return_dict must be True"):
            model(**inputs)


class Ragged(torch.utils.data.Dataset):
    """Sequences of very different numbers of labels, so that a mean of means is another mean."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, V, (L,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: (0, 5, 2, 4, 1, 5, 3, 0)[i]] = -100
        return {"input_ids": ids, "labels": labels}


def trained(folder: Path, fused: bool, **options: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Two steps of two accumulated batches with ``Trainer``: its log, and the parameters."""
    torch.manual_seed(0)
    model = tiny("Llama", tie_word_embeddings=True)
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        logging_steps=1,
        learning_rate=0.01,
        optim="sgd",
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=Ragged(), eval_dataset=Ragged())
    head = FusedHead(model) if fused else None
    trainer.train()
    if head is not None:
        assert model(**tokens()).logits is None
        head.undo()
    return trainer.state.log_history, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_trainer_with_gradient_accumulation(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("accelerate")
    (log, parameters), (own_log, own_parameters) = (trained(tmp_path, fused, **options) for fused in (True, False))
    relative = 1e-5 if not options else 2e-2
    compared = 0
    for entry, own in zip(log, own_log, strict=True):
        for name in entry.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert entry[name] == pytest.approx(own[name], rel=relative)
            compared += 1
    assert compared == 6
    for name, value in own_parameters.items():
        torch.testing.assert_close(parameters[name], value, rtol=relative, atol=relative * float(value.abs().max()))
