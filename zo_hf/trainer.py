"""The whole glue to transformers: a Trainer whose backward pass is replaced by forward passes.

What the stock loop does around a step (data, clipping, `optimizer.step()`, schedule, callbacks, logs, evaluation,
checkpoints) stays as it is; the mixin replaces how a step's gradient comes about, which parameters the optimizer gets,
and what a checkpoint holds.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.optimization import Adafactor
from transformers.trainer_optimizer import is_optimizer_factory

from zo_hf import checkpoint
from zo_hf.budget import Budget
from zo_hf.config import ZOConfig
from zo_hf.directions import UnitVectors
from zo_hf.distributed import Grid, Ranks, make_grid, naming_lost_ranks, share_batches
from zo_hf.model_setup import (
    base_model,
    check_model,
    check_trainable,
    make_subspace,
    moves_along_coordinates,
    retarget,
    subspace_name,
)
from zo_hf.optimizers import SeededSGD
from zo_hf.probes.model_loss import ModelLoss, loss_kind
from zo_hf.quantization import quantized_layers, stored_tensors, training_allowed
from zo_hf.sharding import Sharding, fsdp_settings, is_sharded, is_sharded_model
from zo_hf.stability.monitor import StabilityCallback
from zo_hf.subspaces import Folded, Full
from zo_hf.subspaces.peft_methods import adds_to_the_loss, tokens_in_front
from zo_hf.trainer_checkpoints import CheckpointsMixin
from zo_hf.trainer_learning_rate import LearningRateMixin
from zo_hf.trajectory import recorder
from zo_hf.trajectory.header import weights_hash
from zo_hf.zeroth_order import Estimate, ZerothOrder

logger = logging.getLogger(__name__)


class ZOTrainerMixin(CheckpointsMixin, LearningRateMixin):
    """Makes a Trainer subclass forward-only: `class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer)`.

    Takes what the Trainer takes; `args` must be a `ZOConfig`.

    Attributes:
        zo: the engine while training runs, else None.

    Raises:
        ValueError: an argument cannot work forward-only; the message names it and what to use instead.
    """

    zo: ZerothOrder | None = None
    optimizer: Any
    _ranks = Ranks()
    _batches_compared = False
    _learning_rate_is_automatic = False
    _learning_rate_given: str | float | None = None

    def __init__(self, model: Any = None, args: ZOConfig | None = None, *more: Any, **kwargs: Any) -> None:
        if args is None:
            args = ZOConfig(output_dir="tmp_trainer")
        if not isinstance(args, ZOConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; ZOTrainer needs a zo_hf.ZOConfig, which takes the same."
            )
        if model is not None:
            check_model(model, args)
        self._users_groups: list[list[nn.Parameter]] | None = None
        self._recorder: recorder.Recorder | None = None
        self._estimate: Estimate | None = None
        self._budget = Budget(args)
        with training_allowed(), self._budget.of(args):  # a dataset without a length is refused without max_steps
            super().__init__(model, args, *more, **kwargs)
        self.add_callback(self._budget)
        if self._stability is None and self.args.zo_stability_steps:
            self.add_callback(StabilityCallback(self.args.zo_stability_steps, self.args.zo_stability_action))
        if model is None:
            check_model(self.model, args)  # what model_init made
        quantized_layers(self.model)  # readies them, so that an evaluation before any training is the same as after
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process; start with `accelerate launch`, or show it one GPU "
                "with CUDA_VISIBLE_DEVICES."
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and self.args.world_size == 1:
            raise ValueError(
                f"{processes} processes were launched and each would train alone; pass use_cpu=True if they are meant to "
                "run on CPUs together, or unset WORLD_SIZE if there is one only."
            )
        for argument, value in (
            ("optimizers", self.optimizer),
            ("optimizer_cls_and_kwargs", self.optimizer_cls_and_kwargs),
        ):
            if self.args.zo_subspace == "full" and value is not None and not moves_along_coordinates(self.args):
                raise ValueError(
                    f"{argument}=... needs gradients, which zo_subspace='full' never holds; leave it out, or use "
                    "zo_subspace='low_rank'."
                )
        if self._sharding is not None and self.optimizer is not None:
            raise ValueError(
                "optimizers=... holds the model's parameters, which FSDP replaces by shards; use optim=... or "
                "optimizer_cls_and_kwargs=..., which get the coordinates."
            )

    # The engine's life: it is made with the optimizer and gone when `train` returns.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`; afterwards, and after an exception too, the model is a plain one with what was learnt.

        Args:
            resume_from_checkpoint: a folder, or True for the last one in `output_dir` that was written to its end.
        """
        if self.model_init is None:
            check_trainable(self.model)
        resume_from_checkpoint = checkpoint.to_resume(resume_from_checkpoint, self.args.output_dir)
        self._resumed_from = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        self.found_learning_rate = None
        try:
            with naming_lost_ranks(), self._budget.of(self.args, self._optimizer_divides()):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._finish_zeroth_order()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the coordinates, and the engine that gives it gradients."""
        self._finish_last_attempt()
        self.args.read_numbers()
        self._checkpoints = checkpoint.CheckpointWriter()
        self._batches_compared = False
        if self._sharding is not None:
            self._shard(self.model)
        else:
            # What DistributedDataParallel would do: each process may have initialised an adapter or a head of its own.
            held = (*stored_tensors(self.model).values(), *self.model.buffers())
            for tensor in {id(tensor): tensor for tensor in held}.values():
                self._ranks.take_from_first(tensor)
        args = self.args
        users = self.optimizer
        among = None if users is None else [p for group in users.param_groups for p in group["params"]]
        subspace = make_subspace(self.model, args, among)
        if isinstance(subspace, Full) and users is not None:
            raise ValueError("optimizers=... needs gradients, which zo_subspace='full' never holds; leave it out.")
        self.zo = zo = ZerothOrder(
            self.model,
            subspace,
            eps=None if args.zo_eps == "auto" else float(args.zo_eps),
            num_directions=args.zo_num_directions,
            estimator=args.zo_estimator,
            direction=args.zo_direction,
            active_layers=args.zo_active_layers,
            coordinate_order=args.zo_coordinate_order,
            rule=args.zo_rule,
            rule_options=args.rule_options(),
            max_projected_grad=args.zo_max_projected_grad,
            normalize=args.zo_normalize,
            batched=args.zo_batched_probes,
            seed=args.seed,
            ranks=self._ranks,
        )
        self._learning_rate_given = args.learning_rate
        self._finds_learning_rate = args.learning_rate == "auto"
        if args.learning_rate is None or self._finds_learning_rate:
            # Until training ends: the same arguments may be for a model of another kind next time.
            args.learning_rate = subspace.default_learning_rate
            if not zo.rule.divides_scale_out and zo.normalisation is None:
                args.learning_rate = zo.estimator.learning_rate(args.learning_rate)
            self._learning_rate_is_automatic = True
        self._budget.watch(zo, self._ranks)
        if self._sharding is not None:
            zo.evaluator.recover = functools.partial(self._sharding.recover, self.model)
        logger.info(
            "zeroth-order training: zo_subspace=%s with %s coordinates, zo_eps=%g, %s, %s forward passes a step",
            subspace.name,
            f"{subspace.dimension:,}",
            zo.estimator.eps,
            self._says_learning_rate() if users is None else type(users).__name__,
            zo.forward_passes_per_step,
        )
        if users is not None:
            self._users_groups = retarget(users, subspace)
        else:
            self.optimizer = self._new_optimizer(zo)
        if self._finds_learning_rate:
            self._check_findable(self.optimizer)
        zo.prepare(self.optimizer)
        if self._stability is not None:
            self._stability.watch(zo, self.optimizer)
        if self._sharding is not None:
            self._check_shared_forwards(zo)
        return self.optimizer

    @property
    def _stability(self) -> StabilityCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, StabilityCallback)), None)

    def _check_shared_forwards(self, zo: ZerothOrder) -> None:
        """Every process of a sharded model has to make every forward pass, or the others wait for it for ever."""
        probes = len(zo.estimator.probes())
        measured = 0 if zo.curvature is None else len(zo.curvature.probes)
        parts = (probes, zo.forward_passes_per_step - probes, measured)
        if any(part % self._ranks.grid.directions for part in parts):
            raise ValueError(
                f"zo_parallel={self.args.zo_parallel!r} cannot share out the {zo.forward_passes_per_step} forward passes "
                "of a step equally, as fsdp=... needs; use zo_parallel='data'."
            )

    def _new_optimizer(self, zo: ZerothOrder) -> torch.optim.Optimizer:
        groups = zo.coordinates(self.args.weight_decay)
        if isinstance(zo.subspace, Full):
            return SeededSGD(groups, zo.subspace, lr=self.args.learning_rate)
        if self.optimizer_cls_and_kwargs is not None:
            kind, kwargs = self.optimizer_cls_and_kwargs
        else:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if is_optimizer_factory(kind):
            raise ValueError(
                f"optimizer_cls_and_kwargs={kind!r} builds from a model; pass an Optimizer class instead."
            )
        if kind is Adafactor:
            # Its default moves each tensor relative to its own size, and coordinates begin at zero.
            kwargs = {**kwargs, "scale_parameter": False, "relative_step": False}
        return kind(groups, **kwargs)

    def _finish_zeroth_order(self) -> None:
        if self.zo is None:
            return
        learnt = self.zo.finish()
        if learnt is not self.model:
            self.model = self.model_wrapped = learnt
        self._forget_engine()

    def _finish_last_attempt(self) -> None:
        """A restart by auto_find_batch_size comes with an engine that has taken its steps; go on from where they led."""
        if self._becoming_adapter() is None:
            self._finish_zeroth_order()
        elif self.zo is not None:  # an adapter that was begun cannot be gone on with as factors: begin again
            self.zo.subspace.detach()
            self._forget_engine()

    def _forget_engine(self) -> None:
        zo, self.zo = self.zo, None
        if self._learning_rate_is_automatic:
            self.args.learning_rate, self._learning_rate_is_automatic = self._learning_rate_given, False
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        if zo is None:
            return
        if self._sharding is not None:
            self._sharding.base_hash = None
        optimizer = self._torch_optimizer()
        if self._stability is not None and self._stability.monitor is not None:
            self._stability.monitor.detach()
        if self._users_groups is None:
            self.optimizer = None
        else:
            optimizer.state.clear()
            for group, params in zip(optimizer.param_groups, self._users_groups, strict=True):
                group["params"] = params
            self.optimizer, self._users_groups = optimizer, None

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def _record_to(self, log: recorder.Recorder) -> None:
        assert self.zo is not None
        self._recorder = self.zo.on_step = log

    # A step.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Probe the loss on one micro-batch; after the step's last one, fill the coordinates' gradient.

        Returns:
            The step's loss (see `Estimate`) with its last micro-batch, and 0 with the others, which it includes: the same
            on every rank, whichever probes a rank has evaluated.
        """
        assert self.zo is not None
        if self._recorder is None and self.args.should_save:
            # Not before: only now is everything in place that the first step starts from.
            output_dir, required = self._where_to_record()
            base_hash = None if self._sharding is None else self._sharding.base_hash
            self._record_to(recorder.begin(self.zo, self._torch_optimizer(), output_dir, required, base_hash))
        if model.training:
            model.eval()
        inputs = self._prepare_inputs(inputs)
        if self.zo.at_start_of_step:
            self._check_ranks(inputs)
        weight = 1.0 if self._loss_is_scaled(num_items_in_batch) else 1.0 / self.current_gradient_accumulation_steps
        self.zo.probe(self._closure(model, inputs, num_items_in_batch), weight)
        loss = 0.0
        if self.accelerator.sync_gradients:
            self._estimate = self.zo.finish_estimate()
            loss = self._estimate.loss
            if not self._estimate.is_finite:
                logger.warning("step %d skipped: a loss or projected gradient is not finite", self.zo.step)
        return torch.tensor(loss, device=self.args.device, dtype=torch.float32)

    def _closure(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Any:
        """The loss of a micro-batch, in parts where it is the model's own, so that probes can share a forward pass."""

        def sequential(inputs: dict[str, Any]) -> Tensor:
            # compute_loss may take labels out of the dict it is given.
            return self.compute_loss(model, dict(inputs), num_items_in_batch=num_items)

        unwrapped = base_model(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        own_loss = (
            type(self).compute_loss in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
            and self.label_smoother is None
            and self.compute_loss_func is None
            and "labels" in inputs
            and isinstance(unwrapped, PreTrainedModel)
            and loss_kind(unwrapped) is not None
            and not adds_to_the_loss(self.model)
        )
        if not own_loss:
            return lambda: sequential(inputs)
        scaled = self.model_accepts_loss_kwargs and num_items is not None
        factor = self._ranks.grid.data if scaled and self.args.average_tokens_across_devices else 1
        in_front = tokens_in_front(self.model)
        return ModelLoss(model, unwrapped, inputs, sequential, num_items if scaled else None, factor, in_front)

    def _loss_is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether a micro-batch's loss is already divided by the whole step's items, as in Trainer.training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def _clip_grad_norm(self, model: nn.Module) -> float:
        assert self.zo is not None
        return self.zo.subspace.clip_gradient(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        assert self.zo is not None
        return self.zo.subspace.gradient_norm() if grad_norm is None else grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer assumes a forward and a backward pass, three forwards' worth; a step here is its probes."""
        assert self.zo is not None
        passes = self.zo.forward_passes_per_step + self.zo.curvature_passes
        return super().floating_point_ops(inputs) * passes // self._ranks.grid.directions // 3

    # How long it goes on, and what it says.

    def set_initial_training_values(self, args: ZOConfig, dataloader: DataLoader) -> Any:
        """Trainer's, with as many steps as the forward passes pay for, if nothing else says how many."""
        self._budget.see(dataloader)
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """Trainer's; none where the budget does not pay for a step of them."""
        if self._budget.is_spent:
            return [], None
        batches, items = super().get_batch_samples(*args)
        if not self._budget.pays_for(len(batches)):
            self._budget.is_spent = self.control.should_training_stop = True
            return [], None
        return batches, items

    # Several processes.

    def get_tp_size(self) -> int:
        """Trainer's name for the number of ranks that see the same batch; here they evaluate different directions."""
        return super().get_tp_size() * self._ranks.grid.directions

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, with the same batches for ranks that share them."""
        dataloader = super().get_train_dataloader()
        if self._ranks.grid.directions > 1:
            share_batches(dataloader, self._ranks.grid)
        return dataloader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        count = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(count, Tensor) and self.args.world_size > 1 and self.args.average_tokens_across_devices:
            self._ranks.bytes_sent += 8  # every rank's count, an int64
        return count

    def store_flos(self) -> None:
        """Trainer's, which adds up a number of every rank."""
        if self.args.world_size > 1:
            self._ranks.count(torch.tensor(self.current_flos))
        super().store_flos()

    def _check_ranks(self, inputs: dict[str, Any]) -> None:
        assert self.zo is not None
        if not self._batches_compared:
            self._ranks.check_shared_batch(inputs, self.args.device)
            self._batches_compared = True
        every = self.args.zo_check_steps
        if every and self.zo.step % every == 0:
            weights = {name: t for name, t in stored_tensors(self.model).items() if not is_sharded(t)}
            turn = self.zo.step // every
            self._ranks.check_replicas(self.zo.subspace.coordinates, weights, turn, self.zo.step)

    # What surrounds the step.

    def create_accelerator_and_postprocess(self) -> None:
        """No gradient is scaled, so float16 needs no scaler; DeepSpeed is refused, and FSDP shards weights alone."""
        fsdp = fsdp_settings(self.args)
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed shards gradients, of which there are none; launch with FSDP2 or without shards."
            )
        self._ranks = Ranks(_grid(self.args))
        self._sharding = Sharding(fsdp, self.accelerator) if fsdp and self.accelerator.num_processes > 1 else None
        self.is_fsdp_enabled = False
        self.accelerator.scaler = None

    def _shard(self, model: nn.Module) -> None:
        assert self._sharding is not None
        trainable = [p for p in model.parameters() if p.requires_grad]
        is_adapter = subspace_name(model, self.args) == "adapter"
        if self.args.should_save and not is_sharded_model(model):
            # The trajectory says which model it begins at, and this is the last time that one process has all of it.
            self._sharding.base_hash = weights_hash(model, trainable if is_adapter else ())
        self._sharding.shard(model, adapter=is_adapter)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._sharding is None:  # a model to be sharded may not fit on a device
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Autocast and compilation, but no DistributedDataParallel and none of its gradient buckets."""
        if self._sharding is not None and model is self.model:  # an evaluation before any training comes here first
            self._shard(model)
        if training and model is self.model:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the engine's counts on every line that reports a training loss or an evaluation."""
        if self.zo is not None and "loss" in logs and self._estimate is not None:
            gradients = self._estimate.projected_gradients
            logs["zo/projected_grad"] = sum(gradients) / len(gradients)
            logs["zo/forward_passes"] = self.zo.forward_passes
            logs["zo/skipped_steps"] = self.zo.skipped_steps
            if self._stability is not None and self._stability.monitor is not None:
                logs |= self._stability.monitor.logs()
            if isinstance(self.zo.distribution, UnitVectors):
                logs["zo/cycles"] = self.zo.distribution.cycles(self.zo.step)
            if isinstance(self.zo.subspace, Folded) and self.zo.subspace.fold_error is not None:
                logs["zo/fold_error"] = self.zo.subspace.fold_error
            if self.args.world_size > 1:
                self._ranks.bytes_sent += 4  # Trainer averages the float32 loss that it is about to log
                logs["zo/bytes_communicated"] = self._ranks.bytes_sent
            if not self._estimate.is_finite:
                logs["loss"] = self._estimate.loss  # Trainer's filter would print an average of earlier losses
        if self.zo is None or not _reports_evaluation(logs):
            super().log(logs, *args, **kwargs)
            return
        logs["zo/forward_passes"] = self.zo.forward_passes
        super().log(logs, *args, **kwargs)
        del logs["zo/forward_passes"]  # evaluate returns the rest, which a hyperparameter search adds up


class ZOTrainer(ZOTrainerMixin, Trainer):
    """`transformers.Trainer` with backward replaced by forward passes; see `ZOTrainerMixin`."""


class ZOSeq2SeqTrainer(ZOTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with backward replaced by forward passes; see `ZOTrainerMixin`."""


def _reports_evaluation(logs: dict[str, float]) -> bool:
    """Trainer logs how long an evaluation took, under the name of its data, as it does for the whole training."""
    return any(key.endswith("_runtime") for key in logs) and "train_runtime" not in logs


def _grid(args: ZOConfig) -> Grid:
    grid = make_grid(args.zo_parallel, args.world_size, args.process_index, args.zo_num_directions)
    if grid.directions > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            f"zo_parallel={args.zo_parallel!r} needs average_tokens_across_devices=True: ranks that share a batch must "
            "weigh its tokens alike."
        )
    return grid
