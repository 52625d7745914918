"""A step of verl's actor in one pass of the head: loss, every logged value and the gradient of every parameter."""

from __future__ import annotations

import copy
import functools
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.verl_engine import Engine, Sampled
from tests.integrations.verl.engine import engine as engine
from tests.integrations.verl.test_loss import config_of
from unirl_kernels.integrations import one_pass
from unirl_kernels.integrations import verl as ours
from unirl_kernels.testing.budgets import condition_of, violations

transformers = pytest.importorskip("transformers")

TEMPERATURE, V, SIZE = 0.75, 83, 20.0
LENGTHS = ((3, 4), (1, 2), (2, 5), (4, 1))
"""Of prompts and responses."""

CASES: dict[str, dict[str, Any]] = {
    "vanilla": {"use_kl_loss": True, "entropy_coeff": 0.01, "kl_loss_type": "low_var_kl"},
    "counts": {"entropy_coeff": 0.02, "counts": {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 8}},
    "gspo": {"mode": "gspo", "loss_agg_mode": "seq-mean-token-mean"},
    "cispo": {"mode": "cispo", "loss_agg_mode": "seq-mean-token-sum"},
    "geo_mean": {"mode": "geo_mean", "entropy_coeff": 0.01},
    "dppo_tv": {"mode": "dppo_tv"},
    "weighted": {"use_kl_loss": True, "weights": True},
    "bypass": {"mode": "bypass_mode", "rollout_correction": {"rollout_is": "token", "loss_type": "reinforce"}},
    "fixed_length": {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 7},
}


def make(engine: Engine, mode: str = "vanilla", rollout_correction: Any = None, **options: Any) -> Any:
    policy = {"loss_mode": mode} | ({} if rollout_correction is None else {"rollout_correction": rollout_correction})
    return config_of(engine.losses, policy=policy, **options)


def tiny() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": V}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.2))
    return model.eval()


def with_fused_forward(model: Any) -> Any:
    """The same model with verl's fused forward."""
    kind = type("Fused", (type(model),), {})  # verl changes the class
    fused = copy.deepcopy(model)
    fused.__class__ = kind
    apply = importlib.import_module("verl.models.transformers.monkey_patch").patch_forward_with_backends
    apply(fused, use_fused_kernels=True, fused_kernels_backend="torch")
    return fused


def sampled(model: Any) -> Sampled:
    """Random tokens, scored by policies near the model."""
    prompts, responses = ([torch.randint(V, (n[k],)) for n in LENGTHS] for k in range(2))
    scores: list[Tensor] = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        scores.append((logits / TEMPERATURE).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1))
    masks = [torch.ones(len(x), dtype=torch.int64) for x in responses]
    masks[2][1] = 0  # a tool's output
    fields: dict[str, Any] = {"response_mask": masks, "advantages": [torch.randn(1).expand(len(x)) for x in scores]}
    fields["old_log_probs"] = [x + 0.3 * torch.randn(len(x)) for x in scores]
    fields["ref_log_prob"] = [x + 0.5 * torch.randn(len(x)) for x in scores]
    return Sampled(prompts, responses, fields)


def step(
    worker: Any, batch: Sampled, counts: dict[str, Any], dtype: torch.dtype = torch.float32, **flags: Any
) -> list[Tensor]:
    """Gradient of all parameters, loss and logged values of a step."""
    given = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, **counts}
    given |= {"temperature": TEMPERATURE, "use_remove_padding": True, "calculate_entropy": True, **flags}
    worker.engine.module.zero_grad()
    micro_batch = batch.micro_batch(dtype, **given)
    loss, output = worker.engine.forward_step(micro_batch, loss_function=worker.loss_fn, forward_only=False)
    loss.backward()
    assert output["loss"] == loss.item()
    logged = {name: getattr(x, "values", x) for name, x in output["metrics"].items()}
    values = [x[0] if isinstance(x, list) else x for _, x in sorted(logged.items())]
    gradient = torch.cat([x.grad.flatten() for x in worker.engine.module.parameters()])
    return [gradient, loss.detach(), *(torch.tensor(float(x), dtype=torch.float64) for x in values)]


def problems(engine: Engine, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In what a fused step is further from verl's own in float64 than verl's own in float32 allows."""
    options = dict(options)
    counts, weighted = options.pop("counts", {}), options.pop("weights", False)
    torch.manual_seed(0)
    model = tiny()
    batch = sampled(model)
    if weighted:
        weights = [torch.rand(len(x)) + 0.2 for x in batch.responses]
        batch = batch._replace(fields={**batch.fields, "rollout_is_weights": weights})
    exact = engine.worker(copy.deepcopy(model).double(), make(engine, **options))
    truth = step(exact, batch, counts, torch.float64, use_fused_kernels=False)
    fused = with_fused_forward(model)
    plain = step(engine.worker(fused, make(engine, **options)), batch, counts, use_fused_kernels=True)
    worker, losses = engine.worker(fused, make(engine, **options)), []
    fused_loss = one_pass.fused_linear_loss
    monkeypatch.setattr(one_pass, "fused_linear_loss", lambda *a, **k: losses.append(out := fused_loss(*a, **k)) or out)
    ours.fuse(worker)
    got = step(worker, batch, counts, use_fused_kernels=True)
    assert len(losses) == 1
    assert losses[0].loss.requires_grad
    ours.unfuse(worker)
    found = []
    assert len(got) == len(plain) == len(truth)
    for k, (a, b, true) in enumerate(zip(got, plain, truth, strict=True)):
        # Logits are below SIZE; a gradient's factors are in error by that of log-probabilities.
        condition = condition_of(true.double(), SIZE) if k else SIZE
        if text := violations(a.float(), b.float(), true.double(), condition=condition):
            found.append(f"{k}: {text}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_step_is_its_own(name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(engine, CASES[name], monkeypatch) == []


@pytest.mark.parametrize("name", ["vanilla", "gspo"])
def test_slightly_wrong_gradient_would_show(name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = one_pass.OnePass.loss
    off = property(lambda work: loss.fget(work).detach() + 1.0001 * (loss.fget(work) - loss.fget(work).detach()))
    monkeypatch.setattr(one_pass.OnePass, "loss", off)
    found = problems(engine, CASES[name], monkeypatch)
    assert [line.partition(":")[0] for line in found] == ["0"]


def test_slightly_wrong_value_would_show(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one_pass.OnePass.run

    def off(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logp, entropy = run(*args, **kwargs)
        return logp * 1.0001, entropy

    monkeypatch.setattr(one_pass.OnePass, "run", off)
    assert problems(engine, CASES["vanilla"], monkeypatch) != []


def test_scoring_and_other_losses_stay_its_own(engine: Engine) -> None:
    """Log-probabilities of old and reference policies, in the same engine, and a step after ``unfuse``."""
    model = tiny()
    batch, worker = sampled(model), engine.worker(with_fused_forward(model), make(engine))
    own = worker.engine.forward_step
    ours.fuse(worker)
    given = {"temperature": TEMPERATURE, "use_remove_padding": True, "use_fused_kernels": True}
    _, output = worker.engine.forward_step(batch.micro_batch(**given), loss_function=None, forward_only=True)
    got = output["model_output"]["log_probs"].values()[2:6]
    expected = batch.fields["old_log_probs"][0]
    assert got.shape == expected.shape
    ours.unfuse(worker)
    assert worker.engine.forward_step == own
    ours.unfuse(worker)


def test_what_one_pass_cannot_do_is_refused_by_name(engine: Engine) -> None:
    model = tiny()
    fused, batch = with_fused_forward(model), sampled(model)

    def refused(kind: type[Exception], text: str, worker: Any) -> None:
        before = worker.engine.forward_step
        with pytest.raises(kind, match=text):
            ours.fuse(worker)
        assert worker.engine.forward_step == before

    worker = functools.partial(engine.worker, fused)
    refused(ValueError, "ulysses_sequence_parallel_size must be 1, got 2", worker(make(engine), use_ulysses_sp=True,
            ulysses_sequence_parallel_size=2))  # fmt: skip
    refused(ValueError, "loss_mode='clip_cov'", worker(make(engine, mode="clip_cov")))
    refused(ValueError, "set loss_scale_factor", worker(make(engine, loss_agg_mode="seq-mean-token-sum-norm")))
    refused(ValueError, "kl_loss_type='full'", worker(make(engine, use_kl_loss=True, kl_loss_type="full")))
    refused(ValueError, "calculate_sum_pi_squared must be False", worker(make(engine, calculate_sum_pi_squared=True)))
    for name in ("use_fused_kernels", "use_remove_padding"):
        refused(ValueError, rf"model\.{name} must be True", worker(make(engine), **{name: False}))
    refused(ValueError, "impl_backend must be .* LlamaForCausalLM has its own", engine.worker(model, make(engine)))
    others = worker(make(engine))
    refused(TypeError, "loss_fn must be partial", SimpleNamespace(engine=others.engine, loss_fn=print))
    value_head = object.__new__(engine.implementation.FSDPEngine)
    refused(TypeError, "must be verl's FSDPEngineWithLMHead", SimpleNamespace(engine=value_head, loss_fn=print))
    given = {"use_fused_kernels": True}
    for name, value in {"use_fused_kernels": False, "use_remove_padding": False, "distillation_use_topk": True}.items():
        ours.fuse(others)
        with pytest.raises(ValueError, match=f"{name} must be {not value}"):
            step(others, batch, {}, **(given | {name: value}))
    entropic = worker(make(engine, entropy_coeff=0.1))
    ours.fuse(entropic)
    with pytest.raises(ValueError, match=r"calculate_entropy must be True with entropy_coeff=0\.1"):
        step(entropic, batch, {}, use_fused_kernels=True, calculate_entropy=False)
