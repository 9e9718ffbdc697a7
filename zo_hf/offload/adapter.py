"""Adapters of PEFT on a model with offloaded weights.

PEFT makes an adapter's weights on the device of the layer that it wraps. For an offloaded layer this is the meta device, where
their values are lost. So the layers hold stand-ins while PEFT wraps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.offload.hooks import offload_hook, offloaded_weights, put
from zo_hf.offload.weight import OffloadedWeight

_WAY_OUT = (
    "use LoRA with init_lora_weights=True and without DoRA, bias, modules_to_save and trainable_token_indices, or load the "
    "model without offloading"
)


def get_peft_model(model: nn.Module, peft_config: Any, **options: Any) -> Any:
    """Return a model of PEFT around a model with offloaded weights; the adapter's weights are on the device that computes.

    Args:
        model: the model, as `from_pretrained(..., device_map=..., offload_folder=...)` returns it.
        peft_config: the configuration of the adapter.
        options: more arguments of `peft.get_peft_model`.

    Raises:
        ValueError: the adapter would be made of offloaded weights, or would move them; the message says what to use instead.
    """
    import peft

    devices = set(getattr(model, "hf_device_map", {}).values())
    if peft_config.peft_type == peft.PeftType.PREFIX_TUNING and devices and devices <= {"cpu", "disk"}:
        raise ValueError(
            "prefix tuning needs a device other than 'cpu' and 'disk' in device_map, and there is none; keep a "
            "module on the device that computes, or use prompt tuning."
        )
    stand_ins = {weight: _stand_in(weight) for weight in offloaded_weights(model).values()}
    try:
        for weight, stand_in in stand_ins.items():
            for place in weight.places:
                put(*place, stand_in)
        try:
            wrapped = peft.get_peft_model(model, peft_config, **options)  # type: ignore[arg-type]
        except RuntimeError as error:  # of a decomposition, for example
            raise ValueError(f"PEFT makes this adapter of weights that are offloaded; {_WAY_OUT}.") from error
        for weight, stand_in in stand_ins.items():  # PEFT has frozen them
            weight.placeholder.requires_grad_(stand_in.requires_grad)
    finally:
        for weight in stand_ins:
            for place in weight.places:
                put(*place, weight.placeholder)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and (parameter.is_meta or not bool(parameter.isfinite().all())):
            raise ValueError(f"{name} is offloaded, or made of weights that are; {_WAY_OUT}.")
    return wrapped


def bring_in(model: nn.Module, names: set[str]) -> None:
    """Bring offloaded weights into the memory of the device that computes, for good.

    Args:
        model: the model.
        names: names of the weights.

    Raises:
        ValueError: a weight is in a layer with weights that stay offloaded; the message names it.
    """
    weights = offloaded_weights(model)
    brought = {name: weights[name] for name in names & weights.keys()}
    for name, weight in brought.items():
        value = nn.Parameter(weight.value().to(weight.device, copy=True), weight.placeholder.requires_grad)
        for module, attribute in weight.places:
            hook = offload_hook(module)
            if hook is None or set(hook.weights_map.weights.values()) - set(brought.values()):
                raise ValueError(
                    f"{name} is in a layer with weights that stay offloaded; give it the device that computes in device_map."
                )
            put(module, attribute, value)
    for weight in brought.values():
        for module, _ in weight.places:
            hook = offload_hook(module)
            if hook is not None:
                hook.offload, hook.weights_map = False, None


def _stand_in(weight: OffloadedWeight) -> Tensor:
    """Return a tensor like a weight that takes no memory, and spoils whatever is computed of it."""
    like = weight.placeholder
    nan = torch.full((), torch.nan, device=weight.device).to(like.dtype).expand(like.shape)
    return nn.Parameter(nan, like.requires_grad) if isinstance(like, nn.Parameter) else nan
