"""OpenRLHF's actor and losses on its own functions and on this package's: values and gradients within budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("openrlhf", reason="openrlhf is not installed: make test-trainers")


import transformers

from tests.integrations.openrlhf.imported import PolicyLoss, actors, compute_approx_kl
from unirl_kernels.integrations import openrlhf, versions
from unirl_kernels.testing import oracle
from unirl_kernels.testing.budgets import condition_of, violations

V, B, PROMPT, ACTIONS = 97, 3, 4, 9
TEMPERATURE = 0.7


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    yield
    openrlhf.unpatch()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": V}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 4, 7])
    logp = -3 + 0.5 * torch.randn(2, B, ACTIONS, generator=random)
    return {
        "sequences": torch.randint(V, (B, PROMPT + ACTIONS), generator=random),
        "mask": (torch.arange(ACTIONS) < lengths.unsqueeze(-1)).float(),
        "advantages": torch.randn(B, ACTIONS, generator=random),
        "old": logp[0],
        "reference": logp[1],
    }


Step = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


def step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses, what goes into them, and the gradient of all parameters, by OpenRLHF's code."""
    actor = actors.Actor(model, temperature=TEMPERATURE)
    actor.packing_samples = False  # of a model that is given, and not loaded, the actor does not say it
    attention = torch.ones_like(batch["sequences"])
    logp, output = actor(batch["sequences"], batch["mask"], attention, return_output=True, return_entropy=True)
    return finish(model, batch, logp, output.entropy[:, -ACTIONS:])


def finish(model: Any, batch: dict[str, Tensor], logp: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    mask = batch["mask"]
    policy, clipped, ppo_kl, _ = PolicyLoss()(logp, batch["old"], batch["advantages"], mask)[:4]
    kl = (compute_approx_kl(logp, batch["reference"], kl_estimator="k3") * mask).sum() / mask.sum()
    bonus = (entropy * mask).sum() / mask.sum()
    loss = policy + 0.1 * kl - 0.01 * bonus
    model.zero_grad()
    loss.backward()
    found = {"loss": loss, "logp": logp, "entropy": entropy, "kl": kl, "clipped": clipped, "ppo_kl": ppo_kl}
    found |= {name: x.grad.clone() for name, x in model.named_parameters()}
    return {name: x.detach() for name, x in found.items()}


def exactly(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in fp64, log-probabilities and entropies by the oracle."""
    double = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    model = model.double()
    logits = oracle.apply_readout(model(batch["sequences"]).logits[:, :-1], TEMPERATURE, None, 1.0)[:, -ACTIONS:]
    logp = oracle.log_probs(logits, batch["sequences"][:, -ACTIONS:]) * double["mask"]
    found = finish(model, double, logp, oracle.entropy(logits))
    model.float()
    return found


def problems(model: Any, batch: dict[str, Tensor], scale: float = 1.0) -> list[str]:
    plain, exact = step(model, batch), exactly(model, batch)
    with openrlhf.patch():
        got = step(model, batch)
    found = []
    for name, value in got.items():
        value = scale * value if name == "lm_head.weight" else value
        condition = condition_of(exact[name].double(), 10.0)
        found += [f"{name}: {x}" for x in violations(value, plain[name], exact[name].double(), condition=condition)]
    return found


def test_values_and_gradients_are_its_own(model: Any, batch: dict[str, Tensor]) -> None:
    assert problems(model, batch) == []


def test_a_slightly_wrong_gradient_would_show(model: Any, batch: dict[str, Tensor]) -> None:
    assert any(line.startswith("lm_head.weight") for line in problems(model, batch, scale=1.0001))


def test_every_module_gets_its_functions_back() -> None:
    from openrlhf.models import utils

    own = utils.log_probs_from_logits, utils.compute_entropy
    openrlhf.patch()
    assert actors.log_probs_from_logits is utils.log_probs_from_logits is openrlhf.log_probs_from_logits
    assert actors.compute_entropy is openrlhf.compute_entropy
    openrlhf.patch()
    openrlhf.unpatch()
    assert (actors.log_probs_from_logits, actors.compute_entropy) == own
    assert (utils.log_probs_from_logits, utils.compute_entropy) == own


def test_logits_keep_their_values_and_may_have_any_dtype() -> None:
    logits, labels = torch.randn(2, 3, V).bfloat16(), torch.randint(V, (2, 3))
    before = logits.clone()
    logp = openrlhf.log_probs_from_logits(logits, labels, 0.5)
    assert torch.equal(logits, before)
    exact = oracle.log_probs(logits.double() / 0.5, labels)
    assert not violations(logp, oracle.log_probs(logits.float() / 0.5, labels), exact, condition=10.0)


def test_another_version_is_refused_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda _: "0.12.0")
    monkeypatch.setenv(versions.SWITCH, "refuse")
    with pytest.raises(RuntimeError, match=r"openrlhf must be of version 0\.11, got 0\.12\.0"):
        openrlhf.patch()
