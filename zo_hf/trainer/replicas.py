"""A Trainer over several processes that exchange losses instead of gradients; FSDP shards weights only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from zo_hf import kernels
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.feature_cache import FeatureCache
from zo_hf.offload import is_offloaded
from zo_hf.parallel.absent import has_absent
from zo_hf.parallel.agreement import check_agreement, facts_of_optimizer
from zo_hf.parallel.lost_ranks import naming_lost_ranks
from zo_hf.parallel.ranks import Ranks, share_batches
from zo_hf.parallel.shards import is_divided_model, is_sharded
from zo_hf.quantization import stored_tensors
from zo_hf.trainer.common_arguments import common_arguments, common_data, common_weights, name_of_checkpoint
from zo_hf.trainer.division import Division
from zo_hf.trainer.fsdp import Sharding, fsdp_settings
from zo_hf.trainer.host_batches import HostBatchTrainer
from zo_hf.trainer.pipeline import Pipeline
from zo_hf.trainer.setup import grid_of
from zo_hf.trajectory.header import weights_hash


class ReplicaTrainer(HostBatchTrainer):
    """Overrides the hooks of Trainer that concern processes; every process holds the whole model, or shards of it.

    Raises:
        ValueError: the processes were launched in a way that cannot work without gradients.
    """

    args: Any
    model: Any
    zo: ZerothOrder | None
    _ranks = Ranks()
    _division: Division | None = None
    _is_compared = False
    _compiled: nn.Module | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create Trainer's accelerator without a gradient scaler; refuse DeepSpeed, and let FSDP shard weights only."""
        fsdp = fsdp_settings(self.args)
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed shards gradients, and there are none; launch with FSDP2, or without sharding.")
        self._ranks = Ranks(grid_of(self.args))
        if fsdp and self.accelerator.num_processes > 1:
            self._division = Sharding(fsdp, self.accelerator)
        elif self._ranks.grid.stages > 1:
            self._division = Pipeline(self._ranks, self.args.device, self.args.ddp_timeout)
            self._gather_from_pipelines()
        self.is_fsdp_enabled = False
        self.accelerator.scaler = None

    def get_tp_size(self) -> int:
        """Return the number of ranks that get the same batch, which here evaluate different directions or layers."""
        return super().get_tp_size() * self._ranks.grid.sharing

    def _gather_from_pipelines(self) -> None:
        """Let accelerate gather the rows of every pipeline once, and not once from each of its stages."""
        gather, stages = self.accelerator.gather, self._ranks.grid.stages

        def once(tensors: Any) -> Any:
            def of_first_stages(gathered: Tensor) -> Tensor:
                return gathered.unflatten(0, (self.accelerator.num_processes, -1))[::stages].flatten(0, 1)

            return tree_map(of_first_stages, gather(tensors))

        self.accelerator.gather = once

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's data loader, with equal batches on ranks that share them."""
        return self._with_shared_batches(super().get_train_dataloader(), self._ranks.grid.sharing)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return Trainer's data loader, with equal batches on the stages of a pipeline."""
        return self._with_shared_batches(super().get_eval_dataloader(*args, **kwargs), self._ranks.grid.stages)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return Trainer's data loader, with equal batches on the stages of a pipeline."""
        return self._with_shared_batches(super().get_test_dataloader(*args, **kwargs), self._ranks.grid.stages)

    def _with_shared_batches(self, dataloader: DataLoader, sharing: int) -> DataLoader:
        if sharing > 1:
            share_batches(dataloader, self._ranks.grid, sharing)
        return dataloader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        count = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(count, Tensor) and self.args.world_size > 1 and self.args.average_tokens_across_devices:
            self._ranks.bytes_sent += 8  # super() has gathered every rank's count, an int64
            count = (
                count * self._ranks.grid.stages
            )  # by which it has divided, although it has gathered every batch once
        return count

    def store_flos(self) -> None:
        """Store the floating-point operations, which Trainer adds up over all ranks."""
        if self.args.world_size > 1:
            self._ranks.count_bytes(torch.tensor(self.current_flos))
        super().store_flos()

    def _shard(self, model: nn.Module) -> None:
        assert self._division is not None
        trainable = [p for p in model.parameters() if p.requires_grad]
        is_adapter = self.args.settings().subspace_of(model) == "adapter"
        if self.args.should_save and not is_divided_model(model):
            # The trajectory needs the base's hash, and now is the last moment that one process holds the whole model.
            self._division.base_hash = weights_hash(model, trainable if is_adapter else ())
        self._division.shard(model, adapter=is_adapter)

    def _check_stages(self) -> None:
        """Refuse a model that the processes of a pipeline cannot divide, before anything else is done with it."""
        if has_absent(self.model):
            raise ValueError(
                "this process holds only some layers of the model, which the zo_parallel='pipeline' of another trainer has "
                "divided; load the model that it has saved."
            )
        if self._division is not None:
            self._division.check_model(self.model)

    def _passes(self, closure: Any, features: FeatureCache | None) -> AbstractContextManager[None]:
        """Return the context of a step's forward passes: features come from the cache, or the pipeline streams."""
        if features is not None:
            return features.serving()
        return nullcontext() if self._division is None or self.zo is None else self._division.passes(closure, self.zo)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # A model that will be divided may not fit on one device, and offloaded weights stay where they are.
        if self._division is None and not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap the model for autocast and compilation, but not in DistributedDataParallel with its gradient buckets."""
        if self._division is not None and model is self.model:  # not sharded yet in an evaluation before any training
            self._shard(model)
        if model is self._compiled:
            return model
        if is_offloaded(model) or is_divided_model(model):  # what comes next would move it to the device
            self.accelerator.device_placement = False
        if training and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        else:
            model = super()._wrap_model(model, training, dataloader)
        compiled: Any = self._compiled
        return model if compiled is None or compiled._orig_mod is not model else compiled

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return the model that `model_init` makes; a compiled one is kept apart."""
        return self._without_compilation(super().call_model_init(trial))

    def _without_compilation(self, model: Any) -> Any:
        """Keep a model that the user has compiled for the forward passes, and return the model inside.

        The wrapper hides names, signatures and whether the model is a PEFT model.

        Raises:
            ValueError: the model has offloaded weights.
        """
        self._compiled = model if isinstance(model, nn.Module) and is_compiled_module(model) else None
        if self._compiled is not None and is_offloaded(model._orig_mod):
            raise ValueError(
                "torch.compile keeps the weights that a model was traced with, and device_map offloads them; pass the model "
                "that is not compiled."
            )
        return model if self._compiled is None else model._orig_mod

    @contextmanager
    def _together(self, resumed_from: str | bool | None = None) -> Iterator[None]:
        """Enter a context in which all processes train, if they were started alike; a process that is lost is named.

        Raises:
            ReplicasDiffer: the processes were started with other arguments, or with data of another length.
            RankLost: a process died, or did not answer within `ddp_timeout` seconds.
        """
        with naming_lost_ranks():
            facts = common_arguments(self.args) | {"resume_from_checkpoint": name_of_checkpoint(resumed_from)}
            facts["mixed_precision"] = self.accelerator.mixed_precision
            if not self.args.accelerator_config.dispatch_batches:  # else the first process reads for all
                facts |= common_data(self.train_dataset, self.eval_dataset)
            check_agreement(self._ranks, facts, self.args.device)
            yield

    def _check_method(self, zo: ZerothOrder) -> None:
        """Refuse processes whose engines or optimizers have other options, such as an optimizer of the user's own.

        Raises:
            ReplicasDiffer: they differ.
        """
        assert zo.optimizer is not None
        # A fold by a kernel may differ in its last bits.
        runs = {"zo_kernels": "triton" if kernels.run_on(self.args.device) else "torch"}
        check_agreement(self._ranks, zo.saved_settings() | runs | facts_of_optimizer(zo.optimizer), self.args.device)

    def _check_ranks(self, inputs: dict[str, Any], zo: ZerothOrder) -> None:
        """Compare all weights and the first batch before the first step, then a part of them every `zo_check_steps`."""
        if not self._is_compared:
            self._ranks.check_shared_batch(inputs, self.args.device)
            self._check_weights(zo)
            self._is_compared = True
        elif self.args.zo_check_steps and zo.step % self.args.zo_check_steps == 0:
            self._check_weights(zo, turn=zo.step // self.args.zo_check_steps)

    def _check_weights(self, zo: ZerothOrder | None, turn: int | None = None) -> None:
        """Compare the coordinates and the weights of all processes, unless `zo_check_steps=0`.

        Args:
            zo: the engine; None if the best weights have replaced the last ones.
            turn: number of the check; None reads all weights.

        Raises:
            ReplicasDiffer: they differ.
        """
        if not self.args.zo_check_steps or self._ranks.grid.world_size == 1:
            return
        weights = {name: t for name, t in stored_tensors(self.model).items() if not is_sharded(t)}
        coordinates = {} if zo is None else zo.subspace.coordinates
        self._ranks.check_replicas(coordinates, weights, turn, self.state.global_step if zo is None else zo.step)

    def _make_replicas_equal(self) -> None:
        """Shard the model, or give every process the first one's weights."""
        self._is_compared = False
        check_agreement(self._ranks, common_weights(self.model), self.args.device)
        if self._division is not None:
            self._shard(self.model)
            return
        # Each process may have initialized an adapter or a head of its own; DistributedDataParallel does the same.
        held = (*stored_tensors(self.model).values(), *self.model.buffers())
        for tensor in {id(tensor): tensor for tensor in held}.values():
            self._ranks.broadcast(tensor)
