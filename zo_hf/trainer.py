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
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.optimization import Adafactor
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available

from zo_hf import checkpoint
from zo_hf.config import ZOConfig
from zo_hf.optimizers import SeededSGD
from zo_hf.probes.model_loss import ModelLoss, loss_kind
from zo_hf.sharding import Sharding, fsdp_settings, gathered_state_dict, weights_arrive_later
from zo_hf.subspaces import SUBSPACES, Full, LowRank, Subspace
from zo_hf.zeroth_order import Estimate, ZerothOrder

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _TrainerLike = Any  # the mixin calls what Trainer has, and is no Trainer itself
else:
    _TrainerLike = object


class ZOTrainerMixin(_TrainerLike):
    """Makes a Trainer subclass forward-only: `class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer)`.

    Takes what the Trainer takes; `args` must be a `ZOConfig`.

    Attributes:
        zo: the engine while training runs, else None.

    Raises:
        ValueError: an argument cannot work forward-only; the message names it and what to use instead.
    """

    zo: ZerothOrder | None = None
    optimizer: Any
    _sharding: Sharding | None = None

    def __init__(self, model: Any = None, args: ZOConfig | None = None, *more: Any, **kwargs: Any) -> None:
        if args is None:
            args = ZOConfig(output_dir="tmp_trainer")
        if not isinstance(args, ZOConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; ZOTrainer needs a zo_hf.ZOConfig, which takes the same."
            )
        if model is not None:
            _check_model(model, args)
        self._users_groups: list[list[nn.Parameter]] | None = None
        self._checkpoints = checkpoint.CheckpointWriter()
        self._estimate: Estimate | None = None
        super().__init__(model, args, *more, **kwargs)
        if model is None:
            _check_model(self.model, args)  # what model_init made
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process; start with `accelerate launch`, or show it one GPU "
                "with CUDA_VISIBLE_DEVICES."
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and self.args.world_size == 1:
            raise ValueError(
                f"{processes} processes were launched and each would train alone; pass use_cpu=True if they are meant to "
                "run on CPUs together."
            )
        for argument, value in (
            ("optimizers", self.optimizer),
            ("optimizer_cls_and_kwargs", self.optimizer_cls_and_kwargs),
        ):
            if self.args.zo_subspace == "full" and value is not None:
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
        resume_from_checkpoint = checkpoint.to_resume(resume_from_checkpoint, self.args.output_dir)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._finish_zeroth_order()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the coordinates, and the engine that gives it gradients."""
        self._finish_zeroth_order()  # a restart by auto_find_batch_size comes here with the last attempt's
        if self._sharding is not None:
            self._sharding.shard(self.model, adapter=_subspace_name(self.model, self.args) == "adapter")
        elif self.accelerator.num_processes > 1:
            _take_from_first_process(self.model)
        args = self.args
        users = self.optimizer
        among = None if users is None else [p for group in users.param_groups for p in group["params"]]
        subspace = _make_subspace(self.model, args, among)
        if isinstance(subspace, Full) and users is not None:
            raise ValueError("optimizers=... needs gradients, which zo_subspace='full' never holds; leave it out.")
        self.zo = zo = ZerothOrder(
            self.model,
            subspace,
            eps=None if args.zo_eps == "auto" else float(args.zo_eps),
            num_directions=args.zo_num_directions,
            direction=args.zo_direction,
            normalize=args.zo_normalize,
            batched=args.zo_batched_probes,
            seed=args.seed,
        )
        if self._sharding is not None:
            zo.evaluator.agree = self._sharding.agree
            zo.evaluator.recover = functools.partial(self._sharding.recover, self.model)
        logger.info(
            "zeroth-order training: zo_subspace=%s with %s coordinates, zo_eps=%g, %s forward passes a step",
            subspace.name,
            f"{subspace.dimension:,}",
            zo.estimator.eps,
            2 * args.zo_num_directions,
        )
        if users is not None:
            self._users_groups = _retarget(users, subspace)
        else:
            self.optimizer = self._new_optimizer(zo)
        return zo.prepare(self.optimizer)

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
        if self.zo is not None:
            self.zo.finish()
            self._forget_engine()

    def _forget_engine(self) -> None:
        zo, self.zo = self.zo, None
        if zo is None:
            return
        optimizer = self.optimizer
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if self._users_groups is None:
            self.optimizer = None
        else:
            optimizer.state.clear()
            for group, params in zip(optimizer.param_groups, self._users_groups, strict=True):
                group["params"] = params
            self.optimizer, self._users_groups = optimizer, None

    # A step.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Probe the loss on one micro-batch; after the step's last one, fill the coordinates' gradient.

        Returns:
            The mean loss at the probes, a scalar, scaled as Trainer scales a micro-batch's loss.
        """
        assert self.zo is not None
        if model.training:
            model.eval()
        inputs = self._prepare_inputs(inputs)
        weight = 1.0 if self._loss_is_scaled(num_items_in_batch) else 1.0 / self.current_gradient_accumulation_steps
        losses = self.zo.probe(self._closure(model, inputs, num_items_in_batch), weight)
        if self.accelerator.sync_gradients:
            self._estimate = self.zo.finish_estimate(self._mean_over_processes)
            if not self._estimate.is_finite:
                logger.warning("step %d skipped: a loss or projected gradient is not finite", self.zo.step)
        return losses.mean().to(device=self.args.device, dtype=torch.float32)

    def _closure(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Any:
        """The loss of a micro-batch, in parts where it is the model's own, so that probes can share a forward pass."""

        def sequential(inputs: dict[str, Any]) -> Tensor:
            # compute_loss may take labels out of the dict it is given.
            return self.compute_loss(model, dict(inputs), num_items_in_batch=num_items)

        unwrapped = _base_model(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        own_loss = (
            type(self).compute_loss in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
            and self.label_smoother is None
            and self.compute_loss_func is None
            and "labels" in inputs
            and isinstance(unwrapped, PreTrainedModel)
            and loss_kind(unwrapped) is not None
        )
        if not own_loss:
            return lambda: sequential(inputs)
        scaled = self.model_accepts_loss_kwargs and num_items is not None
        factor = self.accelerator.num_processes if scaled and self.args.average_tokens_across_devices else 1
        return ModelLoss(model, unwrapped, inputs, sequential, num_items if scaled else None, factor)

    def _loss_is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether a micro-batch's loss is already divided by the whole step's items, as in Trainer.training_step."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def _mean_over_processes(self, losses: Tensor) -> Tensor:
        return self.accelerator.reduce(losses, "mean") if self.accelerator.num_processes > 1 else losses

    def _clip_grad_norm(self, model: nn.Module) -> float:
        assert self.zo is not None
        return self.zo.subspace.clip_gradient(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        assert self.zo is not None
        return self.zo.subspace.clip_gradient(float("inf")) if grad_norm is None else grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer assumes a forward and a backward pass, three forwards' worth; a step here is 2q forwards."""
        return super().floating_point_ops(inputs) * 2 * self.args.zo_num_directions // 3

    # What surrounds the step.

    def create_accelerator_and_postprocess(self) -> None:
        """No gradient is scaled, so float16 needs no scaler; DeepSpeed is refused, and FSDP shards weights alone."""
        fsdp = fsdp_settings(self.args)
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed shards gradients, of which there are none; launch with FSDP2 or without shards."
            )
        self._sharding = Sharding(fsdp, self.accelerator) if fsdp and self.accelerator.num_processes > 1 else None
        self.is_fsdp_enabled = False
        self.accelerator.scaler = None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._sharding is None:  # a model to be sharded may not fit on a device
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Autocast and compilation, but no DistributedDataParallel and none of its gradient buckets."""
        if self._sharding is not None and model is self.model:  # an evaluation before any training comes here first
            self._sharding.shard(model, adapter=_subspace_name(model, self.args) == "adapter")
        if training and model is self.model:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the engine's counts on every line that reports a training loss."""
        if self.zo is not None and "loss" in logs and self._estimate is not None:
            gradients = self._estimate.projected_gradients
            logs["zo/projected_grad"] = sum(gradients) / len(gradients)
            logs["zo/forward_passes"] = self.zo.evaluator.forward_passes
            logs["zo/skipped_steps"] = self.zo.skipped_steps
            if not self._estimate.is_finite:
                logs["loss"] = self._estimate.loss  # Trainer's filter would print an average of earlier losses
        super().log(logs, *args, **kwargs)

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoint.clear(Path(self._get_output_dir(trial=trial)) / folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process goes on to write the file that says the checkpoint is complete.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.zo is not None and state_dict is None:
            state_dict = self.zo.folded_state_dict()
        if self._sharding is not None and state_dict is None:
            state_dict = gathered_state_dict(self.model, frozen=not _is_peft(self.model))
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.zo is not None and (self.args.should_save or self._sharding is not None):
            self._checkpoints.save(self.zo, Path(output_dir), write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None and self.zo is not None and not checkpoint.load(self.zo, Path(folder)):
            # An optimizer's state that is there belongs to other parameters than the coordinates.
            logger.warning("%s holds no zeroth-order state; its weights are used and the rest starts anew", folder)
            return
        super()._load_optimizer_and_scheduler(folder)

    def _load_best_model(self) -> None:
        # The engine's coordinates belong to the last step's weights, which are about to be replaced.
        if self.zo is not None:
            self.zo.subspace.detach()
            self._forget_engine()
        super()._load_best_model()


class ZOTrainer(ZOTrainerMixin, Trainer):
    """`transformers.Trainer` with backward replaced by forward passes; see `ZOTrainerMixin`."""


class ZOSeq2SeqTrainer(ZOTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with backward replaced by forward passes; see `ZOTrainerMixin`."""


def _make_subspace(model: nn.Module, args: ZOConfig, among: list[nn.Parameter] | None) -> Subspace:
    name = _subspace_name(model, args)
    common = {
        "target_modules": args.zo_target_modules,
        "exclude_modules": args.zo_exclude_modules,
        "among": among,
        "seed": args.seed,
    }
    if SUBSPACES[name] is LowRank:
        return LowRank(model, rank=args.zo_rank, fold_steps=args.zo_fold_steps, **common)
    return SUBSPACES[name](model, **common)


def _subspace_name(model: nn.Module, args: ZOConfig) -> str:
    if args.zo_subspace == "auto":
        return "adapter" if _is_peft(model) else "low_rank"
    return args.zo_subspace


def _check_model(model: nn.Module, args: ZOConfig) -> None:
    """Refuse, before anything is loaded or moved, what training would only find out later."""
    if args.zo_subspace == "adapter" and not _is_peft(model):
        raise ValueError(
            f"zo_subspace='adapter' needs a PEFT model and {type(model).__name__} is not one; wrap it with "
            "peft.get_peft_model, or use zo_subspace='low_rank'."
        )
    if isinstance(model, PreTrainedModel) and getattr(model, "is_quantized", False):
        raise ValueError(
            "the model is quantised and its weights cannot move yet; attach an adapter with peft.get_peft_model."
        )
    offloaded = [name for name, p in model.named_parameters() if p.is_meta]
    if offloaded and not weights_arrive_later():
        raise ValueError(
            f"{offloaded[0]} is offloaded to the meta device; load the model with a device_map that keeps all weights "
            "in memory."
        )


def _take_from_first_process(model: nn.Module) -> None:
    """What DistributedDataParallel would do: processes may have initialised an adapter or a new head differently."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(broadcast(tensor.data.contiguous()))


def _is_peft(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT one."""
    return model.get_base_model() if _is_peft(model) else model  # type: ignore[operator]


def _retarget(optimizer: torch.optim.Optimizer, subspace: Subspace) -> list[list[nn.Parameter]]:
    """Point an optimizer that was built for the model's parameters at their coordinates; returns the old groups."""
    coordinate_of = {id(site.parameter): subspace.coordinates[site.name] for site in subspace.sites}
    before = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [coordinate_of[id(p)] for p in group["params"] if id(p) in coordinate_of]
    return before
