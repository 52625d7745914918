"""A model of transformers whose forward verl has changed for ``use_fused_kernels``, on its own heads and on ours."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.integrations.verl.modules import Verl, check, triton_kernels, verl
from unirl_kernels.integrations import verl as ours

transformers = pytest.importorskip("transformers")

__all__ = ["triton_kernels", "verl"]

TEMPERATURE, VOCABULARY, LENGTHS = 0.7, 83, (5, 2, 6)


def tiny(kind: Any) -> Any:
    """Of a width that verl's Triton kernels take."""
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"}
    return kind(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.1)).eval()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # verl divides by zero in rows that it does not store
@pytest.mark.parametrize("impl_backend", ["torch", "liger", "triton"])
def test_forward_of_fused_kernels(verl: Verl, request: pytest.FixtureRequest, impl_backend: str) -> None:
    """Log-probabilities, entropies and the gradient of every parameter, in the layout of removed padding."""
    if impl_backend == "triton":
        request.getfixturevalue("triton_kernels")
    apply = importlib.import_module("verl.models.transformers.monkey_patch").patch_forward_with_backends
    plain = tiny(transformers.LlamaForCausalLM)
    fused = tiny(type("Fused", (transformers.LlamaForCausalLM,), {}))  # verl changes the class
    apply(fused, use_fused_kernels=True, fused_kernels_backend=impl_backend)
    ids = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)))
    labels = torch.roll(ids, shifts=-1, dims=-1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    names = [name for name, _ in plain.named_parameters()]

    def run(model: Any, parameters: Sequence[Tensor], **options: Any) -> Any:
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False, "return_dict": True, **options}
        return functional_call(model, dict(zip(names, parameters, strict=True)), kwargs=given)

    def exact(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        logits = run(plain, parameters).logits / TEMPERATURE
        logp, entropy = verl.logits.logprobs_from_logits_naive(logits, labels), verl.logits.entropy_from_logits(logits)
        return logp.squeeze(0), entropy.squeeze(0)

    def theirs(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        output = run(fused, parameters, temperature=TEMPERATURE, shift_labels=labels)
        return output.log_probs.squeeze(0), output.entropy.squeeze(0)

    def patched(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        with ours.patch():
            return theirs(*parameters)

    parameters = [x.detach() for x in plain.parameters()]
    logits = run(plain, parameters).logits
    check(patched, theirs, parameters, exact, torch.logsumexp(logits / TEMPERATURE, -1).abs().max().item())
