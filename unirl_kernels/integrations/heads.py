"""Weight and bias of a model's output layer, also if another library has wrapped the layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from unirl_kernels.api.arguments import check_whole


class HeadParameters(NamedTuple):
    """Weight and bias of an output layer, for ``fused_linear_loss``.

    Args:
        weight: [V, D], differentiable in the parameters from which it was computed.
        bias: [V] or None.

    Examples:
        >>> weight, bias = uk.head_parameters(torch.nn.Linear(3, 4, bias=False))
        >>> weight.shape, bias
        (torch.Size([4, 3]), None)
    """

    weight: Tensor
    bias: Tensor | None


def head_parameters(module: nn.Module) -> HeadParameters:
    """Weight and bias that the forward of an output layer applies: x W^T + b.

    For a ``torch.nn.Linear`` they are its parameters. If PEFT has adapted it with LoRA (Hu et al. 2021,
    arXiv:2106.09685), the weight is

        W = W_0 + sum over active adapters of scaling * B A

    It is computed at each call, so that gradients reach A and B. This takes memory for W and for its gradient, [V, D]
    each. If PEFT trains a copy of the layer (``modules_to_save``), weight and bias are those of the copy.

    Args:
        module: an output layer, for instance ``model.get_output_embeddings()``.

    Returns:
        ``HeadParameters``.

    Raises:
        TypeError: when the layer computes something other than x W^T + b, or its class is unknown.
        ValueError: when it computes x W^T + b only in some states (dropout of an adapter, a merged adapter that is
            switched off), or when its parameters are sharded (FSDP2 outside of the layer's forward, ZeRO-3).

    Examples:
        >>> head = torch.nn.Linear(3, 4)
        >>> weight, bias = uk.head_parameters(head)
        >>> weight is head.weight, bias is head.bias
        (True, True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return head_parameters(_active_copy(module))
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        return _adapted(module)
    return _of_linear(module)


def _of_linear(module: Any) -> HeadParameters:
    _check_linear(module)
    return HeadParameters(_whole("weight", module.weight), None if module.bias is None else _whole("bias", module.bias))


def _check_linear(module: Any) -> None:
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is not nn.Linear.forward:
        # The layers of PEFT's other methods are also called Linear.
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"module must be a torch.nn.Linear, or one adapted by PEFT's LoRA, got {name}")
    if "forward" in vars(module):
        raise TypeError("module's forward must be that of torch.nn.Linear, got one that was put in its place")
    if hooks := [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
        raise TypeError(f"module must have no forward hooks, which would not run, got {hooks[0]!r}")


def _whole(name: str, value: Tensor) -> Tensor:
    check_whole(f"module.{name}", value)
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"module.{name} must be a plain tensor, got {type(value).__name__}")
    return value


def _active_copy(module: Any) -> nn.Module:
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _adapted(module: Any) -> HeadParameters:
    weight, bias = head_parameters(module.base_layer)
    if module.disable_adapters:
        if module.merged:
            raise ValueError("module has a merged adapter that is switched off: unmerge it")
        return HeadParameters(weight, bias)
    if module.merged:
        return HeadParameters(weight, bias)
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        _check_adapter(module, name)
        scaling, b = module.scaling[name], module.lora_B[name]
        weight = weight + (scaling * (b.weight @ module.lora_A[name].weight)).to(weight.dtype)
        if b.bias is not None:
            own = (scaling * b.bias).to(weight.dtype)
            bias = own if bias is None else bias + own
    return HeadParameters(weight, bias)


def _check_adapter(module: Any, name: str) -> None:
    if name in getattr(module, "lora_variant", {}):
        variant = type(module.lora_variant[name]).__name__
        raise TypeError(f"adapter {name!r} must be plain LoRA, got {variant}")
    dropout = module.lora_dropout[name]
    if isinstance(dropout, nn.Dropout) and dropout.p and dropout.training:
        raise ValueError(f"adapter {name!r} must have no dropout on an output layer, got p = {dropout.p}")
    for part in (module.lora_A[name], module.lora_B[name]):
        _check_linear(part)
        _whole("weight", part.weight)
