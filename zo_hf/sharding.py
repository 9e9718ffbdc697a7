"""Weights sharded over processes by FSDP2: what a process holds of a tensor, and what sharding changes in a run.

FSDP gathers a layer's weights for its forward and frees them after it. The coordinates are small: every process holds
all of them as plain tensors, and they enter a module's forward while its weights are gathered. So a probe neither writes
nor sends anything more, and a fold is each process adding its rows of B · Vᵀ to its rows of W.

An adapter's weights are the coordinates themselves: they are kept out of the sharding, whole on every process.

Trainer's and accelerate's own FSDP code shards gradients and an optimizer of the weights. There is neither here, so it
is left out: to them the run is an ordinary distributed one whose model happens to hold shards.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist

logger = logging.getLogger(__name__)


# Tensors.


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; known by its placements, because some builds of torch have no torch.distributed."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process holds of `tensor`, sharing its memory, and the index of its first element in the whole.

    FSDP shards the first dimension as torch.chunk does; a plain tensor is its own part.
    """
    if not is_sharded(tensor):
        return tensor.detach(), 0
    sharded: Any = tensor.detach()
    mesh, rows = sharded.device_mesh, len(sharded)
    first_row = 0
    for dimension, placement in enumerate(sharded.placements):
        if not placement.is_replicate():
            assert placement.is_shard(0), f"{placement} is no way in which FSDP shards by default"
            first_row = min(-(-rows // mesh.size(dimension)) * mesh.get_local_rank(dimension), rows)
    return sharded.to_local(), first_row * (sharded.numel() // max(rows, 1))


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The elements of `whole` that this process holds of `like`, a tensor of the same shape."""
    part, first = local_part(like)
    return whole.reshape(-1)[first : first + part.numel()].view(part.shape)


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which every process gives the part that it holds of `like`; `part` itself if that is plain.

    To be called by every process. The whole is on the CPU of each machine's first process, and on meta elsewhere: it is
    there to be saved.
    """
    if not is_sharded(like):
        return part
    whole = _sharded(part, like).full_tensor()
    return whole.to("cpu" if os.environ.get("LOCAL_RANK", "0") == "0" else "meta")


def gathered_state_dict(model: nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """The state dict of a model with its shards gathered; see `gather`.

    Args:
        frozen: whether the weights that do not train are in it.
    """
    reshard(model)
    state = model.state_dict(keep_vars=True)
    wanted = {name: t for name, t in state.items() if frozen or t.requires_grad or not is_sharded(t)}
    return {name: gather(local_part(t)[0], t) for name, t in wanted.items()}


def is_sharded_model(model: nn.Module) -> bool:
    """Whether FSDP2 holds the model's weights; right after a forward its parameters may all be gathered, and plain."""
    return next(_sharded_modules(model), None) is not None


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that FSDP has kept since a forward: what is written next are the shards."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (module for module in model.modules() if isinstance(module, FSDPModule))


def _sharded(part: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


# The run.


class Sharding:
    """Shards the model of a run, as accelerate's FSDP settings ask for.

    Args:
        plugin: accelerate's plugin, from `fsdp_settings`.
        accelerator: the run's accelerator.

    Attributes:
        base_hash: `weights_hash` of the model as it was sharded, until its weights change.
    """

    base_hash: str | None = None

    def __init__(self, plugin: Any, accelerator: Accelerator) -> None:
        self._plugin, self._accelerator = plugin, accelerator
        # Probes run in the precision they have without shards: autocast's, on weights gathered in their own dtype.
        plugin.mixed_precision_policy = None
        # Weights that only the first process has loaded are sent to the others below, adapters included.
        plugin.cpu_ram_efficient_loading = False
        # Under FSDP2 accelerate's own would shard the model, and look for the coordinates among its parameters.
        accelerator.prepare = functools.partial(_prepare, accelerator)

    def shard(self, model: nn.Module, adapter: bool) -> None:
        """Shard the model in place, from the first process's weights; afterwards it stays so.

        Args:
            adapter: whether the trainable parameters are an adapter's, which stay whole.
        """
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
        from torch.distributed.fsdp import register_fsdp_forward_method

        if is_sharded_model(model):
            reshard(model)
            return
        trainable = [p for p in model.parameters() if p.requires_grad]
        _check_shardable(model, [] if adapter else trainable)
        device = self._accelerator.device
        _take_from_first_process(model, device)
        if adapter:
            trainable = [p for p in model.parameters() if p.requires_grad]
            for parameter in trainable:
                parameter.data = parameter.data.to(device)
            self._plugin.ignored_modules = [nn.ParameterList(trainable)]
        if self._plugin.auto_wrap_policy is None:
            logger.warning(
                "fsdp_auto_wrap_policy is not set, so that every forward gathers the whole model on every device; set it "
                "to TRANSFORMER_BASED_WRAP to gather a layer at a time."
            )
        fsdp2_prepare_model(self._recipe(device), model)
        if adapter and any(is_sharded(p) for p in model.parameters() if p.requires_grad):
            raise ValueError(
                "zo_subspace='adapter' with FSDP keeps the adapter whole, which needs torch 2.7 or newer."
            )
        if self._plugin.reshard_after_forward:
            # FSDP keeps the root's weights gathered for a backward pass that never comes.
            model.set_reshard_after_forward(True)  # type: ignore[operator]
        model.register_load_state_dict_pre_hook(self._take_parts)
        # transformers then keeps generating on every process until the last one is done: each forward gathers weights.
        model._is_fsdp_managed_module = True  # type: ignore[assignment]
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")

    def _take_parts(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Lets `load_state_dict` take a state dict of whole tensors: each process keeps its own parts of them."""
        self.base_hash = None
        reshard(module)
        for name, tensor in module.state_dict(keep_vars=True).items():
            given = state_dict.get(prefix + name)
            if given is not None and is_sharded(tensor) and not is_sharded(given):
                part = part_of(given, tensor).to(device=tensor.device, dtype=tensor.dtype, copy=True)
                state_dict[prefix + name] = _sharded(part, tensor)

    def recover(self, model: Any) -> None:
        """Make the model usable after an exception in its forward."""
        if not hasattr(model, "reset_iter_state"):
            raise RuntimeError(
                "a batch of all probes failed, which this torch cannot undo; set zo_batched_probes=False."
            )
        model.reset_iter_state()

    def _recipe(self, device: torch.device) -> Any:
        """What accelerate reads off an accelerator to shard a model.

        The mesh is on the run's device, not on the machine's accelerator, and weights are not cast to float32.
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
    """Whether transformers has left this process's weights on meta, because the first one's will be sent to it."""
    settings = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    asked = all(os.environ.get(name, "false").lower() in ("true", "1") for name in settings)
    return asked and os.environ.get("RANK", "0") != "0"


def fsdp_settings(args: Any) -> Any:
    """accelerate's plugin as `fsdp` in the arguments or `accelerate launch --use_fsdp` ask for it, None if neither does.

    Raises:
        ValueError: it cannot work without a backward pass; the message names the setting and what to use instead.
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
            "fsdp_version=1 flattens weights, which perturbing them in the forward cannot work with; set fsdp_version: 2 "
            "in accelerate's fsdp_config, or version 2 in fsdp_config of the arguments."
        )
    from accelerate.utils import FullyShardedDataParallelPlugin

    # A new one: on CPUs accelerate keeps none, and what it keeps elsewhere may stem from an earlier run.
    plugin = FullyShardedDataParallelPlugin(**asked)
    if args.zo_subspace == "full":
        raise ValueError(
            "zo_subspace='full' with FSDP would draw noise for weights that other processes hold; use "
            "zo_subspace='low_rank'."
        )
    # accelerate has made a policy of the option.
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "fsdp_offload_params (cpu_offload in fsdp_config) keeps the shards on the CPU, where no layer can be probed; "
            "leave it out."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing (activation_checkpointing in fsdp_config) saves memory in a backward pass, of "
            "which there is none; leave it out."
        )
    for name in ("auto_find_batch_size", "torch_compile", "save_only_trajectory"):
        if getattr(args, name):
            raise ValueError(f"{name}=True is not supported together with FSDP; leave it out.")
    return plugin


def refuse_sharded_at_loading(model: nn.Module) -> None:
    """Refuse a model that something other than FSDP2 has sharded.

    Raises:
        ValueError: it is one; the message says how to load it.
    """
    if any(is_sharded(p) for p in model.parameters()) and not is_sharded_model(model):
        raise ValueError(
            "the model was sharded when it was loaded; load it without tp_plan and distributed_config, and shard it with "
            "FSDP2 if it does not fit on one device."
        )


def _check_shardable(model: nn.Module, moving: list[nn.Parameter]) -> None:
    refuse_sharded_at_loading(model)
    dtypes = {p.dtype for p in moving if p.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(
            f"FSDP shards trainable weights of one dtype only and the model has {', '.join(sorted(map(str, dtypes)))}; "
            "load it with a single dtype=..., or cast it with model.to(dtype)."
        )


def _take_from_first_process(model: nn.Module, device: torch.device) -> None:
    """Every parameter and buffer as the first process has it; what is on meta elsewhere gets memory on the CPU first.

    A tensor at a time goes through the device, where the processes can talk: the model may not fit on it.
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
    """`Accelerator.prepare`, each object on its own: data loaders, models and optimizers, then schedulers."""
    prepared = [accelerator._prepare_one(one, first_pass=True) for one in objects]
    prepared = [accelerator._prepare_one(one) for one in prepared]
    return tuple(prepared) if len(prepared) > 1 else prepared[0]
