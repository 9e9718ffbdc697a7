"""Checks of a Trainer's model, arguments and processes before training starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from zo_hf.case import Case, facts_of_model
from zo_hf.compatibility import check
from zo_hf.offload import check_values
from zo_hf.parallel.ranks import Grid, make_grid
from zo_hf.quantization import coded_layers, is_quantized, quantized_layers
from zo_hf.settings import Settings
from zo_hf.subspaces import SUBSPACES, Adapter, Norms, Scales, has_factors
from zo_hf.subspaces.lora import check_peft
from zo_hf.subspaces.peft_methods import is_peft, refuse_what_needs_gradients
from zo_hf.subspaces.sites import find_sites
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.fsdp import fsdp_settings, refuse_sharded_at_loading, weights_arrive_later


def check_model(model: nn.Module, args: ZOConfig) -> None:
    """Refuse a model that cannot be trained with these arguments, before anything is loaded or moved.

    Raises:
        ValueError: the model cannot be trained; the message names the argument and the way out.
    """
    scripted = next((name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ValueError(
            f"model has a TorchScript module ({scripted or type(model).__name__!r}), which probes cannot "
            "perturb; pass the Python module from which it was made."
        )
    settings = args.settings()
    if args.zo_subspace == "adapter" and not is_peft(model):
        raise ValueError(
            f"zo_subspace='adapter' needs a PEFT model and {type(model).__name__} is not one; wrap it with "
            "peft.get_peft_model, or use zo_subspace='low_rank'."
        )
    if settings.subspace_of(model) == "adapter":
        refuse_what_needs_gradients(model)
    facts = {"fsdp": fsdp_settings(args) is not None, "several processes": args.world_size > 1}
    of_run = frozenset(name for name, holds in facts.items() if holds)
    check(Case(settings, vars(args), facts_of_model(model) | of_run))
    if is_quantized(model):
        _check_quantized(model, settings)
    elif settings.subspace == Scales.name:
        Scales.check(quantized_layers(model), model)
    settings.estimator_kind.check_model(model)
    if not weights_arrive_later():
        check_values(model)
    refuse_sharded_at_loading(model)
    if not weights_arrive_later() and (args.zo_target_modules is not None or args.zo_exclude_modules is not None):
        find_sites(model, args.zo_target_modules, args.zo_exclude_modules, quantized=quantized_layers(model))


def check_trainable(model: nn.Module) -> None:
    """Refuse a model in which everything is frozen, or in which a hook would change a gradient.

    Raises:
        ValueError: no parameter is trainable, or one has a hook on its gradient.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trainable.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook on its gradient, and there is no backward pass to call it; remove the hook, and freeze "
                "what should not move."
            )
    if trainable:
        return
    if is_peft(model):
        raise ValueError(
            "the adapter has no trainable weights; load it with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if not quantized_layers(model):
        raise ValueError(
            f"all parameters of {type(model).__name__} are frozen; set requires_grad of those that should train, for "
            "example by model.requires_grad_(True)."
        )


def check_still_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a step of parameters that have been frozen after the engine had been made for them.

    Args:
        parameters: those that move and were trainable then, by name.

    Raises:
        ValueError: one has been frozen since.
    """
    frozen = next((name for name, parameter in parameters.items() if not parameter.requires_grad), None)
    if frozen is not None:
        raise ValueError(
            f"{frozen} has been frozen after training began, perhaps by a callback, and would still move; freeze it before "
            "train() is called."
        )


def _check_quantized(model: Any, settings: Settings) -> None:
    kinds = sorted({parameter.device.type for parameter in model.parameters()} - {"meta"})
    if len(kinds) > 1:
        raise ValueError(
            f"the quantized model is spread over {' and '.join(kinds)}; load it with a device_map that keeps all of it on "
            "GPUs, or all of it on the CPU."
        )
    kind = SUBSPACES[settings.subspace_of(model)]
    if kind not in (Norms, Adapter) and not coded_layers(model):
        raise ValueError(
            f"the model's quantization is not supported ({type(model.hf_quantizer).__name__}); attach an adapter with "
            "peft.get_peft_model, or use zo_subspace='norms'."
        )
    if has_factors(kind) and not settings.fold_steps:
        check_peft()


def check_processes(args: ZOConfig) -> None:
    """Refuse several GPUs in one process, processes that would each train alone, and batches that one would choose alone.

    Raises:
        ValueError: the launch is one of these; the message says how to launch.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process; start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES "
            "to one GPU."
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and args.world_size == 1:
        raise ValueError(
            f"{processes} processes were launched and each would train alone; pass use_cpu=True to train together on CPUs, "
            "or unset WORLD_SIZE if there is only one process."
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise ValueError(
            "auto_find_batch_size=True would give a process that runs out of memory smaller batches than the others; set "
            "per_device_train_batch_size to what fits on every process."
        )


def grid_of(args: ZOConfig) -> Grid:
    """Make the grid of a run's processes.

    Raises:
        ValueError: the processes cannot divide the work as `zo_parallel` says.
    """
    stages: int | str = "auto" if args.zo_pipeline_stages is None else args.zo_pipeline_stages
    grid = make_grid(args.zo_parallel, args.world_size, args.process_index, args.zo_num_directions, stages)
    if grid.sharing > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            f"zo_parallel={args.zo_parallel!r} needs average_tokens_across_devices=True, because ranks that share a batch "
            "must weigh its tokens equally; set it."
        )
    return grid


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype in which autocast lets the model compute; None without autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
