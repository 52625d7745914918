"""Output layers that another library has wrapped: the parameters that their forward applies, or a clear error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import unirl_kernels as uk

peft = pytest.importorskip("peft")

V, D = 37, 12


class Model(nn.Module):
    """The smallest thing PEFT adapts."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(D, D), nn.Linear(D, V, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.body(x))


def adapted(bias: bool = False, **options: object) -> nn.Module:
    """The head of a model with an adapter whose B is not zero, as after some training."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], **options})
    model = peft.get_peft_model(Model(bias), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.base_model.model.lm_head


def batch() -> tuple[Tensor, uk.Batch]:
    torch.manual_seed(1)
    target = torch.randint(0, V, (2, 5))
    old_logp, ref_logp = (-5 * torch.rand(2, 5) for _ in range(2))
    return torch.randn(2, 5, D), uk.Batch(target, torch.tensor([1.0, -1.0]), old_logp, ref_logp)


def check_like_forward(head: nn.Module) -> None:
    """Loss and the gradients of hidden states and trained parameters are those of the layer's own forward."""
    head = head.double()
    x, samples = batch()
    trained = [p for p in head.parameters() if p.requires_grad]
    hidden = x.double().requires_grad_()
    plain = uk.fused_loss(head(hidden), samples, uk.grpo()).loss
    expected = torch.autograd.grad(plain, [hidden, *trained])
    weight, bias = uk.head_parameters(head)
    loss = uk.fused_linear_loss(hidden, weight, samples, uk.grpo(), bias=bias).loss
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(loss, [hidden, *trained]), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layer_gives_its_own_parameters(bias: bool) -> None:
    layer = nn.Linear(D, V, bias=bias)
    parameters = uk.head_parameters(layer)
    assert parameters.weight is layer.weight
    assert parameters.bias is layer.bias


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_lora_adapter_takes_part(options: dict[str, object], bias: bool) -> None:
    check_like_forward(adapted(bias=bias or "lora_bias" in options, **options))


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids=str)
def test_active_adapters_take_part(active: list[str]) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(False), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["lm_head"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.base_model.set_adapter(active)
    check_like_forward(model.base_model.model.lm_head)


def test_trained_copy_of_the_layer_takes_part() -> None:
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["lm_head"])
    head = peft.get_peft_model(Model(False), config).base_model.model.lm_head
    nn.init.normal_(head.modules_to_save["default"].weight)
    check_like_forward(head)


def test_merged_adapter_is_in_the_weight() -> None:
    head = adapted()
    x, _ = batch()
    before = head(x)
    head.merge()
    weight, _ = uk.head_parameters(head)
    torch.testing.assert_close(x @ weight.t(), before)


def test_adapter_that_is_switched_off_takes_no_part() -> None:
    head = adapted()
    head.enable_adapters(False)
    assert uk.head_parameters(head).weight is head.base_layer.weight
    head.enable_adapters(True)
    head.merge()
    head._disable_adapters = True  # enable_adapters(False) would unmerge
    with pytest.raises(ValueError, match="merged adapter that is switched off"):
        uk.head_parameters(head)


def test_what_is_no_matrix_product_is_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"LoRA, got .*\.Scaled$"):
        uk.head_parameters(Scaled(D, V))
    with pytest.raises(TypeError, match=r"LoRA, got torch\.nn\..*\.Embedding$"):
        uk.head_parameters(nn.Embedding(V, D))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Tensor"):
        uk.head_parameters(torch.ones(V, D))  # type: ignore[arg-type]
    patched = nn.Linear(D, V)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="put in its place"):
        uk.head_parameters(patched)
    hooked = nn.Linear(D, V)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="no forward hooks"):
        uk.head_parameters(hooked)


def test_adapters_that_are_more_than_a_matrix_are_refused() -> None:
    with pytest.raises(TypeError, match="must be plain LoRA, got DoraLinearVariant"):
        uk.head_parameters(adapted(use_dora=True))
    dropping = adapted(lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"no dropout on an output layer, got p = 0\.1"):
        uk.head_parameters(dropping)
    check_like_forward(dropping.eval())


@pytest.mark.parametrize("config", ["VeraConfig", "LoHaConfig"])
def test_other_methods_of_peft_are_refused(config: str) -> None:
    model = peft.get_peft_model(Model(False), getattr(peft, config)(r=2, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"LoRA, got peft\.tuners\..*\.Linear$"):
        uk.head_parameters(model.base_model.model.lm_head)


def test_partitioned_parameter_is_refused() -> None:
    layer = nn.Linear(D, V, bias=False)
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"^module\.weight must be a whole tensor.*ZeRO-3"):
        uk.head_parameters(layer)
    hidden, samples = batch()
    with pytest.raises(ValueError, match=r"^weight must be a whole tensor.*ZeRO-3"):
        uk.fused_linear_loss(hidden, layer.weight, samples, uk.sft())


def test_sharded_parameter_is_refused() -> None:
    layer = nn.Linear(D, V, bias=False)
    layer.weight.full_tensor = lambda: None
    with pytest.raises(ValueError, match=r"^module\.weight must be a whole tensor, got a DTensor"):
        uk.head_parameters(layer)


def test_other_things_named_like_adapters() -> None:
    """A module is what its attributes do, not what it is called: a stranger's adapter has to fail."""
    stranger = nn.Module()
    stranger.lora_A = SimpleNamespace()
    with pytest.raises(TypeError, match=r"LoRA, got torch\.nn\..*\.Module$"):
        uk.head_parameters(stranger)
