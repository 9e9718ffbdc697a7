"""What a Trainer's model and arguments become: the subspace, the optimizer's parameters, and what is refused at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import is_peft_available

from zo_hf.config import ZOConfig
from zo_hf.estimators import ESTIMATORS
from zo_hf.quantization import is_quantized, quantized_layers
from zo_hf.sharding import fsdp_settings, refuse_sharded_at_loading, weights_arrive_later
from zo_hf.subspaces import SUBSPACES, Norms, Scales, Subspace, has_factors, subspace_kind
from zo_hf.subspaces.lora import check_peft
from zo_hf.subspaces.peft_methods import refuse_what_needs_gradients
from zo_hf.subspaces.sites import find_sites


def make_subspace(model: nn.Module, args: ZOConfig, among: list[nn.Parameter] | None) -> Subspace:
    """The subspace that the options ask for.

    Args:
        among: only these parameters may move, e.g. those an optimizer was built for; None means all.
    """
    name = subspace_name(model, args)
    common = {
        "target_modules": args.zo_target_modules,
        "exclude_modules": args.zo_exclude_modules,
        "among": among,
        "seed": args.seed,
    }
    kind = subspace_kind(name, moves_along_coordinates(args))
    if has_factors(kind):
        subspace = kind(model, rank=args.zo_rank, fold_steps=args.zo_fold_steps, **common)
        subspace.check_end()
        return subspace
    return kind(model, **common)


def moves_along_coordinates(args: ZOConfig) -> bool:
    """Whether directions are single coordinates, so that all of them are held in memory, with a gradient."""
    return ESTIMATORS[args.zo_estimator].along_coordinates


def subspace_name(model: nn.Module, args: ZOConfig) -> str:
    """`zo_subspace`, or what "auto" stands for with this model."""
    if args.zo_subspace == "auto":
        return "adapter" if is_peft(model) else "low_rank"
    return args.zo_subspace


def check_model(model: nn.Module, args: ZOConfig) -> None:
    """Refuse, before anything is loaded or moved, what training would only find out later."""
    if args.zo_subspace == "adapter" and not is_peft(model):
        raise ValueError(
            f"zo_subspace='adapter' needs a PEFT model and {type(model).__name__} is not one; wrap it with "
            "peft.get_peft_model, or use zo_subspace='low_rank'."
        )
    if subspace_name(model, args) == "adapter":
        refuse_what_needs_gradients(model)
    if is_peft(model) and args.zo_subspace in ("low_rank", "core") and quantized_layers(model):
        raise ValueError(
            f"zo_subspace={args.zo_subspace!r} cannot move a quantised model that has an adapter; use "
            "zo_subspace='adapter', which goes on with it."
        )
    if is_quantized(model):
        _check_quantized(model, args)
    elif args.zo_subspace == Scales.name:
        Scales.check(quantized_layers(model), model)
    estimator = ESTIMATORS[args.zo_estimator]
    estimator.check_model(model)
    if estimator.needs_tangents and args.torch_compile:
        raise ValueError(f"torch_compile=True loses the tangents of zo_estimator={estimator.name!r}; leave it out.")
    if estimator.needs_tangents and fsdp_settings(args):
        raise ValueError(
            f"fsdp=... shards the weights that zo_estimator={estimator.name!r} gives tangents to; use "
            "zo_estimator='two_point'."
        )
    offloaded = [name for name, p in model.named_parameters() if p.is_meta]
    if offloaded and not weights_arrive_later():
        raise ValueError(
            f"{offloaded[0]} is offloaded to the meta device; load the model with a device_map that keeps all weights "
            "in memory."
        )
    refuse_sharded_at_loading(model)
    if not offloaded and (args.zo_target_modules is not None or args.zo_exclude_modules is not None):
        find_sites(model, args.zo_target_modules, args.zo_exclude_modules, quantized=quantized_layers(model))


def check_trainable(model: nn.Module) -> None:
    """Refuse to train what can only be evaluated."""
    if is_peft(model) and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the adapter has nothing to train; load it with PeftModel.from_pretrained(..., is_trainable=True)."
        )


def _check_quantized(model: Any, args: ZOConfig) -> None:
    if args.zo_subspace == "full":
        raise ValueError(
            "zo_subspace='full' moves every weight by less than what a quantised one can hold; use zo_subspace='low_rank', "
            "whose factors stay apart from it."
        )
    if args.torch_compile:
        raise ValueError("torch_compile=True cannot compile the layers of a quantised model; leave it out.")
    if fsdp_settings(args):
        raise ValueError("fsdp=... cannot shard a quantised model; load it with a device_map, or not quantised.")
    kinds = sorted({parameter.device.type for parameter in model.parameters()} - {"meta"})
    if len(kinds) > 1:
        raise ValueError(
            f"the quantised model lies on {' and '.join(kinds)}; load it with a device_map that keeps it on GPUs, or all of "
            "it on the CPU."
        )
    kind = SUBSPACES[subspace_name(model, args)]
    if kind is not Norms and not quantized_layers(model):
        raise ValueError(
            f"the model is quantised in a way that is not known here ({type(model.hf_quantizer).__name__}); attach an "
            "adapter with peft.get_peft_model, or use zo_subspace='norms'."
        )
    if has_factors(kind) and not args.zo_fold_steps:
        check_peft()


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT has wrapped it."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT one."""
    return model.get_base_model() if is_peft(model) else model  # type: ignore[operator]


def retarget(optimizer: torch.optim.Optimizer, subspace: Subspace) -> list[list[nn.Parameter]]:
    """Point an optimizer that was built for the model's parameters at their coordinates; returns the old groups."""
    coordinate_of = {id(site.parameter): subspace.coordinates[site.name] for site in subspace.sites}
    before = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [coordinate_of[id(p)] for p in group["params"] if id(p) in coordinate_of]
    return before
