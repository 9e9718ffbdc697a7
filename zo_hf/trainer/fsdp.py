"""FSDP2 in a run: reading accelerate's settings and sharding the model.

FSDP gathers a layer's weights before its forward and frees them afterwards. The coordinates are small: every process holds
all of them as plain tensors, and they enter a module's forward while its weights are gathered. So a probe writes nothing
and needs no communication of its own. In a fold, each process adds its rows of B · Vᵀ to its rows of W.

An adapter's weights are themselves the coordinates: they are not sharded, and every process holds all of them.

Trainer's and accelerate's own FSDP code shards gradients, and an optimizer of the weights. A run here has neither, so that
code is not used: Trainer and accelerate see an ordinary distributed run, and a model that holds shards.
"""

from __future__ import annotations

import functools
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.evaluate import ProbeEvaluator
from zo_hf.parallel.ranks import Grid
from zo_hf.parallel.shards import is_sharded, is_sharded_model, part_of, reshard, shard_like

logger = logging.getLogger(__name__)


class Sharding:
    """Shards the model of a run by accelerate's FSDP settings; a `Division`.

    Args:
        plugin: accelerate's plugin, from `fsdp_settings`.
        accelerator: the run's accelerator.

    Attributes:
        base_hash: `weights_hash` of the model when it was sharded; None once its weights have changed.
    """

    base_hash: str | None = None
    facts = frozenset({"fsdp"})

    def __init__(self, plugin: Any, accelerator: Accelerator) -> None:
        self._plugin, self._accelerator = plugin, accelerator
        # Probes must run in the same precision as without shards: autocast's, on weights gathered in their own dtype.
        plugin.mixed_precision_policy = None
        # `shard` sends weights that only the first process has loaded to the others, including adapters.
        plugin.cpu_ram_efficient_loading = False
        # accelerate's own `prepare` would shard the model, and look for the coordinates among its parameters.
        accelerator.prepare = functools.partial(_prepare, accelerator)

    def check_model(self, model: nn.Module) -> None:
        """Refuse nothing yet: `shard` does, once the weights of the first process have arrived."""

    def shard(self, model: nn.Module, adapter: bool) -> None:
        """Shard the model in place and for good, from the first process's weights.

        Args:
            model: the model; one that is sharded already stays as it is.
            adapter: True if the trainable parameters are an adapter's, which stay whole.
        """
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
        from torch.distributed.fsdp import register_fsdp_forward_method

        if is_sharded_model(model):
            reshard(model)
            return
        trainable = [p for p in model.parameters() if p.requires_grad]
        _check_shardable(model, [] if adapter else trainable)
        device = self._accelerator.device
        _broadcast_from_first(model, device)
        if adapter:
            trainable = [p for p in model.parameters() if p.requires_grad]
            for parameter in trainable:
                parameter.data = parameter.data.to(device)
            self._plugin.ignored_modules = [nn.ParameterList(trainable)]
        if self._plugin.auto_wrap_policy is None:
            logger.warning(
                "fsdp_auto_wrap_policy is not set, so every forward gathers the whole model on every device; set it to "
                "TRANSFORMER_BASED_WRAP to gather a layer at a time."
            )
        fsdp2_prepare_model(self._accelerator_for_sharding(device), model)
        if adapter and any(is_sharded(p) for p in model.parameters() if p.requires_grad):
            raise ValueError(
                "zo_subspace='adapter' with fsdp=... keeps the adapter whole, which needs torch 2.7 or newer; install one, or use "
                "zo_subspace='low_rank' on a model without an adapter."
            )
        if self._plugin.reshard_after_forward:
            # FSDP keeps the root's weights gathered for a backward pass that never comes.
            model.set_reshard_after_forward(True)  # type: ignore[operator]
        model.register_load_state_dict_pre_hook(self._keep_own_shards)
        # With this mark, transformers generates on every process until all are done, as every forward gathers weights.
        model._is_fsdp_managed_module = True  # type: ignore[assignment]
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")

    def _keep_own_shards(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let `load_state_dict` take a state dict of whole tensors; each process keeps its own parts of them."""
        self.base_hash = None
        reshard(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            given = state_dict.get(prefix + name)
            if given is not None and is_sharded(tensor) and not is_sharded(given):
                part = part_of(given, tensor).to(device=tensor.device, dtype=tensor.dtype, copy=True)
                state_dict[prefix + name] = shard_like(part, tensor)

    def enter(self, evaluator: ProbeEvaluator, model: nn.Module) -> None:
        """Let an evaluator know that all processes make its forward passes together."""
        evaluator.recover = functools.partial(self.recover, model)

    def check_steps(self, zo: ZerothOrder, grid: Grid, parallel: str) -> None:
        """Refuse steps in which a process would skip a forward pass, because the others would wait forever.

        Raises:
            ValueError: the ranks cannot divide a step's forward passes equally.
        """
        probes = len(zo.estimator.probes())
        measured = 0 if zo.curvature is None else len(zo.curvature.probes)
        parts = (probes, zo.forward_passes_per_step - probes, measured)
        if any(part % grid.directions for part in parts):
            raise ValueError(
                f"zo_parallel={parallel!r} cannot divide the {zo.forward_passes_per_step} forward passes of a step "
                "equally, as fsdp=... needs; use zo_parallel='data'."
            )

    def passes(self, closure: Any, zo: ZerothOrder) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def recover(self, model: Any) -> None:
        """Make the model usable after an exception in its forward."""
        if not hasattr(model, "reset_iter_state"):
            raise RuntimeError(
                "a batch of all probes failed, and this torch cannot recover from it; set zo_batched_probes=False."
            )
        model.reset_iter_state()

    def _accelerator_for_sharding(self, device: torch.device) -> Any:
        """Make a stand-in for an accelerator, with the attributes that accelerate reads to shard a model.

        Its mesh is on the run's device, not on the machine's accelerator, and its weights are not cast to float32.
        """
        mesh, parallelism = getattr(self._accelerator, "torch_device_mesh", None), None
        if mesh is None:
            mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
            parallelism = SimpleNamespace(fsdp_dim_names=["dp_shard"])
        return SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=self._plugin),
            torch_device_mesh=mesh,
            parallelism_config=parallelism or self._accelerator.parallelism_config,
            mixed_precision="no",
            is_main_process=self._accelerator.is_main_process,
            device=device,
        )


def weights_arrive_later() -> bool:
    """Return whether this process's weights are on meta, because the first process will send them."""
    settings = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    asked = all(os.environ.get(name, "false").lower() in ("true", "1") for name in settings)
    return asked and os.environ.get("RANK", "0") != "0"


def fsdp_settings(args: Any) -> Any:
    """Make accelerate's FSDP plugin from `fsdp` in the arguments, or from `accelerate launch --use_fsdp`.

    Returns:
        The plugin; None if neither asks for FSDP.

    Raises:
        ValueError: a setting cannot work without a backward pass; the message names it and the way out.
    """
    asked = getattr(args, "fsdp_plugin_args", None)
    if asked is None:
        if args.fsdp:
            raise ValueError("fsdp_config asks for XLA's FSDP, which is not supported; leave xla out of it.")
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return None
        asked = {}
    if int(asked.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != 2:
        raise ValueError(
            "fsdp_version=1 flattens weights, so they cannot be perturbed in the forward; set fsdp_version: 2 in "
            "accelerate's fsdp_config, or version 2 in fsdp_config of the arguments."
        )
    from accelerate.utils import FullyShardedDataParallelPlugin

    # accelerate keeps no plugin on CPUs, and the one that it keeps elsewhere may come from an earlier run.
    plugin = FullyShardedDataParallelPlugin(**asked)
    check(Case(args.settings(), vars(args), frozenset({"fsdp"})))
    # accelerate has replaced the option by a policy.
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "fsdp_offload_params (cpu_offload in fsdp_config) keeps the shards on the CPU, where no layer can be probed; "
            "leave it out."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing (activation_checkpointing in fsdp_config) saves memory in a backward pass only, "
            "and there is none; leave it out."
        )
    return plugin


def refuse_sharded_at_loading(model: nn.Module) -> None:
    """Refuse a model that was sharded by something else than FSDP2.

    Raises:
        ValueError: the model was; the message says how to load it.
    """
    if any(is_sharded(p) for p in model.parameters()) and not is_sharded_model(model):
        raise ValueError(
            "the model was sharded when it was loaded; load it without tp_plan and distributed_config, and use FSDP2 if "
            "it does not fit on one device."
        )


def _check_shardable(model: nn.Module, moving: list[nn.Parameter]) -> None:
    refuse_sharded_at_loading(model)
    dtypes = {p.dtype for p in moving if p.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP shards trainable weights of one dtype only, and the model has {', '.join(sorted(map(str, dtypes)))}; "
            "load it with a single dtype=..., or cast it with model.to(dtype)."
        )


def _broadcast_from_first(model: nn.Module, device: torch.device) -> None:
    """Give every process the first one's parameters and buffers; tensors on meta first get memory on the CPU.

    One tensor at a time is sent through the device, because the whole model may not fit on it.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:  # tied weights stay tied
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = table is module._parameters
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                table[name] = made[id(tensor)]  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()):
        sent = tensor.detach().to(device).contiguous()
        dist.broadcast(sent, src=0)
        tensor.data.copy_(sent)


def _prepare(accelerator: Accelerator, *objects: Any, **_: Any) -> Any:
    """Prepare each object separately, as `Accelerator.prepare` does without FSDP; schedulers come last."""
    prepared = [accelerator._prepare_one(one, first_pass=True) for one in objects]
    prepared = [accelerator._prepare_one(one) for one in prepared]
    return tuple(prepared) if len(prepared) > 1 else prepared[0]
