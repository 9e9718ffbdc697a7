"""`ZOTrainer`: a Trainer with the backward pass replaced by forward passes.

Trainer's loop stays as it is: data, clipping, `optimizer.step()`, schedule, callbacks, logs, evaluation, checkpoints. The
class overrides only hooks of Trainer. They estimate the gradient of a step, give the optimizer its parameters, and add the
engine's files to checkpoints. Other objects, which the hooks call, do the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from zo_hf.case import Case
from zo_hf.compatibility import check
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.estimate import Estimate
from zo_hf.evaluation.feature_cache import FeatureCache
from zo_hf.evaluation.row_losses import GroupedLoss
from zo_hf.parallel.signals import whole
from zo_hf.quantization import quantized_layers, training_allowed
from zo_hf.serving import ServedModel
from zo_hf.stability.monitor import StabilityCallback, StabilityMonitor
from zo_hf.stability.rounding_noise import FORWARD_PASSES, warn_of_rounding
from zo_hf.subspaces.peft_methods import base_model
from zo_hf.trainer import learning_rate, setup
from zo_hf.trainer.budget import Budget
from zo_hf.trainer.checkpoints import (
    FinishesFirst,
    RunFiles,
    becoming_adapter,
    check_saveable,
)
from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.host_batches import labels_on_host
from zo_hf.trainer.lock import locked
from zo_hf.trainer.logs import engine_logs, reports_evaluation
from zo_hf.trainer.loss import MicroBatchLosses
from zo_hf.trainer.method import method_of_run
from zo_hf.trainer.micro_batch import MicroBatch
from zo_hf.trainer.objectives import check_objective
from zo_hf.trainer.offloaded_head import check_head
from zo_hf.trainer.optimizer import (
    give_back,
    new_optimizer,
    retarget,
)
from zo_hf.trainer.overrides import NoBackward, overrides
from zo_hf.trainer.rate_watch import RateWatch
from zo_hf.trainer.resuming import to_resume
from zo_hf.trainer.root_mode import RootMode
from zo_hf.trainer.searching import SearchingTrainer
from zo_hf.trainer.served import ServedLosses, Serving, check_served
from zo_hf.trainer.weight_watch import WeightWatch

logger = logging.getLogger(__name__)

_DECAY = "get_decay_parameter_names"


class ZOTrainer(SearchingTrainer):
    """`transformers.Trainer` with the backward pass replaced by forward passes.

    It takes the arguments of Trainer, with `args` a `ZOConfig`. For other Trainer subclasses see `forward_only`.

    Attributes:
        zo: the engine while training runs; None at other times.
        found_learning_rate: see `SearchingTrainer`.

    Raises:
        ValueError: an argument cannot work forward-only; the message names it and the way out.
    """

    @property
    def _losses_kind(self) -> Any:
        return MicroBatchLosses if self._serving is None else ServedLosses

    def __init__(self, model: Any = None, args: ZOConfig | None = None, *more: Any, **kwargs: Any) -> None:
        if args is None:
            args = ZOConfig(output_dir="tmp_trainer")
        if not isinstance(args, ZOConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; ZOTrainer needs a zo_hf.ZOConfig, which takes the same options."
            )
        model = self._without_compilation(model)
        if isinstance(model, nn.Module):
            setup.check_model(model, args)
        self._root_mode, self._no_backward = RootMode(), NoBackward(self)
        self._users_groups: list[list[nn.Parameter]] | None = None
        self._estimate: Estimate | None = None
        self._features: FeatureCache | None = None
        self._learning_rate: learning_rate.InitialLearningRate | None = None
        self._trainable: dict[str, nn.Parameter] = {}
        self._budget = Budget(args)
        with training_allowed():
            # Trainer needs max_steps if a data set has no length; the budget may determine it.
            super().__init__(model, self._budget.resolved(args), *more, **kwargs)
        self.args = args
        self._files = RunFiles(args, self._ranks)
        self._serving = None if args.server_url is None else Serving(args)
        self.add_callback(self._budget)
        self.add_callback(RateWatch())
        self.add_callback(WeightWatch(lambda: self._trainable))
        if self._stability is None and args.zo_stability_steps:
            self.add_callback(StabilityCallback(args.zo_stability_steps, args.zo_stability_action))
        if not isinstance(model, nn.Module):
            setup.check_model(self.model, args)  # model_init, or a subclass, has made it
        check_objective(self)
        check_head(self)
        self._check_stages()
        # Prepares the layers, so that an evaluation before any training gives the same as after.
        quantized_layers(self.model)
        setup.check_processes(args)
        check(Case(args.settings(), vars(args), self._facts))
        if self._serving is not None and self.model_init is None:
            check_served(self.model, args)

    # The engine's lifetime: from the making of the optimizer until `train` returns.

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as Trainer does; afterwards, even after an exception, the trained model is without an engine.

        Args:
            resume_from_checkpoint: a folder, or True for the last intact checkpoint in `output_dir`.
            trial: see Trainer.

        Raises:
            ValueError: the checkpoint is damaged or of another run, or another run uses the folder; the message says so.
        """
        if self.model_init is None:
            setup.check_trainable(self.model)
            check_saveable(self.model, self.args)
        folder, device = Path(self._get_output_dir(trial)), self.args.device
        with self._together(resume_from_checkpoint), locked(folder, self._ranks, device):
            resumed = to_resume(resume_from_checkpoint, Path(self.args.output_dir), self._ranks, device)
            self._resumed_from = resumed
            return self._train(None if resumed is None else str(resumed), trial, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        self._forget_own_optimizer()
        self.found_learning_rate = None
        finishes = FinishesFirst(lambda: self._check_weights(self.zo), self._finish_zeroth_order)
        self.callback_handler.callbacks.insert(0, finishes)
        try:
            with self._spending(self.args.learning_rate == "auto"):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            with whole():
                self.callback_handler.callbacks.remove(finishes)
                self._finish_zeroth_order()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the engine, and the optimizer of its coordinates."""
        self._finish_last_attempt()
        self._forget_own_optimizer()
        setup.check_trainable(self.model)
        self._make_replicas_equal()
        users = self.optimizer
        zo, rate = self._make_engine(self._chosen_parameters())
        logger.info(
            "zeroth-order training: zo_subspace=%s with %s coordinates, zo_eps=%g, %s, %s forward passes per step",
            zo.subspace.name,
            f"{zo.subspace.dimension:,}",
            zo.estimator.eps,
            rate if users is None else type(users).__name__,
            zo.forward_passes_per_step,
        )
        if users is not None:
            self._users_groups = retarget(users, zo.subspace)
        else:
            decayed = self.get_decay_parameter_names(self.model) if overrides(self, _DECAY) else None
            self.optimizer = new_optimizer(
                zo, self.args.weight_decay, rate.value, lambda: self._optimizer_class(rate.value), decayed
            )
        if rate.is_searched:
            learning_rate.check_searchable(
                zo, self.optimizer, self.args, self.train_dataset, self._facts - {"optimizers"}
            )
        zo.prepare(self.optimizer)
        self._check_method(zo)
        if self._stability is not None:
            self._stability.watch(zo, self.optimizer)
        if self._division is not None:
            self._division.check_steps(zo, self._ranks.grid, self.args.zo_parallel)
        self._no_backward.watch(self.accelerator)
        if self._serving is not None:
            self._serving.of(self.model, zo)  # compares the servers' model with this one
        return self.optimizer

    def _make_engine(self, among: Sequence[Tensor] | None) -> tuple[ZerothOrder, learning_rate.InitialLearningRate]:
        """Create the engine and what evaluates its losses, and return it with the initial learning rate.

        Args:
            among: the parameters of the user's optimizer or groups, which alone may move; None allows all.
        """
        arguments = dict(vars(self.args))
        if self._stability is not None:  # the user may have passed the callback
            arguments["zo_stability_steps"] = self._stability.every
        settings = method_of_run(self.args, arguments, self._facts, self._resumed_from)
        subspace = settings.make_subspace(self.model, among)
        subspace.check_end()
        with whole():  # an engine that is in the model, but not known here, would stay there
            self.zo = zo = ZerothOrder(self.model, settings, subspace=subspace, ranks=self._ranks)
        moving = {site.name for site in subspace.sites}
        self._trainable = {n: p for n, p in self.model.named_parameters() if n in moving and p.requires_grad}
        if zo.row_groups is not None:
            zo.row_groups.expect(self._train_batch_size, self.args.gradient_accumulation_steps)
        self._begin_private(zo)
        given = "auto" if self._searches_only else self.args.learning_rate
        self._learning_rate = rate = learning_rate.initial_learning_rate(given, zo)
        if self._serving is not None:
            check_served(self.model, self.args)
        self._losses = self._losses_kind(self, self._ranks)
        zo.evaluator.autocast_dtype = setup.autocast_dtype(self.accelerator)
        self._features = self._feature_cache(zo)
        self._budget.watch(zo, self._ranks, self._losses)
        if self._division is not None:
            self._division.enter(zo.evaluator, self.model)
        return zo, rate

    def _feature_cache(self, zo: ZerothOrder) -> FeatureCache | None:
        """Make the cache of features that `zo_feature_cache_gib` asks for.

        Raises:
            ValueError: the model or the choice of what moves leaves nothing to keep.
        """
        if not self.args.zo_feature_cache_gib:
            return None
        moving = {module for site in zo.subspace.sites for module, _ in site.uses}
        return FeatureCache(base_model(self.model), moving, self.args.zo_feature_cache_gib)

    @property
    def served(self) -> ServedModel:
        """The model as servers evaluate it; an error without `server_url`."""
        assert self._serving is not None
        return self._serving.of(self.model, self.zo)

    @property
    def _stability(self) -> StabilityCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, StabilityCallback)), None)

    @property
    def _monitor(self) -> StabilityMonitor | None:
        return None if self._stability is None else self._stability.monitor

    def _finish_zeroth_order(self) -> None:
        if self.zo is None:
            return
        with whole():
            learned = self.zo.finish()
            if learned is not self.model:
                self.model = self.model_wrapped = self.callback_handler.model = learned
            self._forget_engine()

    def _finish_last_attempt(self) -> None:
        """Finish the engine of an attempt that auto_find_batch_size restarts; the new attempt goes on from its weights."""
        if becoming_adapter(self.zo) is None:
            self._finish_zeroth_order()
        elif self.zo is not None:  # factors that become an adapter are never folded into weights: start anew
            self.zo.subspace.detach()
            self._forget_engine()

    def _forget_engine(self) -> None:
        zo, self.zo, self._features, self._trainable = self.zo, None, None, {}
        self._files.close()
        self._root_mode.leave()
        self._no_backward.leave()
        if self._serving is not None:
            self._serving.close()
        if zo is None:
            return
        self._keep_training(zo)
        if self._division is not None:
            self._division.base_hash = None
        if self._monitor is not None:
            self._monitor.detach()
        if self._users_groups is None:
            self._keep_optimizer(zo)
        else:
            self.optimizer = self._torch_optimizer()
            give_back(self.optimizer, self._users_groups)
            self._users_groups = None

    def _adopt_optimizer(self) -> None:
        """Create the engine around the optimizer that a subclass's `create_optimizer` made without a call of super()."""
        prepared = self.optimizer
        if prepared is None:
            raise ValueError(
                f"{type(self).__name__}.create_optimizer sets no self.optimizer; let it set one, or return "
                "super().create_optimizer()."
            )
        check(Case(self.args.settings(), vars(self.args), self._facts - {"optimizers"} | {"create_optimizer"}))
        self.optimizer = self._torch_optimizer()
        ZOTrainer.create_optimizer(self)
        self.optimizer = prepared

    # A step.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Probe the loss on one micro-batch; after the step's last one, fill the coordinates' gradient.

        Returns:
            The whole step's loss (see `Estimate`) for its last micro-batch, and 0 for the others. It is the same on every
            rank. float32, ().
        """
        if self.zo is None:
            raise ValueError(
                f"{type(self).__name__}.training_step belongs to a step of train(), which estimates a gradient by forward "
                "passes; call train(), or compute_loss if you only want the loss."
            )
        self._root_mode.enter(model, self.model)
        self.zo.subspace.reads.list_moved(model)
        labels = labels_on_host(inputs)
        inputs = self._prepare_inputs(inputs)
        micro_batches = self.current_gradient_accumulation_steps
        closure, weight = self._losses.of(model, MicroBatch(inputs, num_items_in_batch, micro_batches, labels))
        if self.zo.at_start_of_step:
            setup.check_still_trainable(self._trainable)
            self._check_ranks(inputs, self.zo)
            is_first = self.zo.step == 0 and self.zo.private is None
            if is_first and self._budget.pays_for(micro_batches, beside=FORWARD_PASSES):
                warn_of_rounding(self.zo, closure, weight)
        with self._passes(closure, self._features):
            self.zo.probe(closure, weight)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        loss = self._finish_estimate(self.zo, closure) if self.accelerator.sync_gradients else 0.0
        # Not torch.tensor, which copies from the host and waits.
        return torch.full((), loss, device=self.args.device, dtype=torch.float32)

    def _finish_estimate(self, zo: ZerothOrder, closure: Callable[[], Any]) -> float:
        """Fill the coordinates' gradient after a step's last micro-batch, and return the step's loss."""
        with self._passes(closure, self._features):
            self._estimate = zo.finish_estimate()
        self._no_backward.estimated(zo.step)
        self._rate_watch.loss = self._estimate.loss
        if not self._estimate.is_finite:
            logger.warning(
                "step %d is skipped: a loss or projected gradient is not finite; if this repeats, lower learning_rate",
                zo.step,
            )
        if not self._files.records and self.args.should_save:
            # Only now is everything known that the first step depends on, down to the parameters that move.
            base_hash = None if self._division is None else self._division.base_hash
            self._files.begin_log(zo, self._torch_optimizer(), self._run_folder, base_hash)
        return self._estimate.loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, at the current weights wherever a loss reads them, and leave the model's buffers."""
        if self.zo is None:
            return super().evaluation_loop(*args, **kwargs)
        zo, predict = self.zo, self.prediction_step

        def predict_at_present(*args: Any, **kwargs: Any) -> Any:
            with zo.subspace.reads.evaluating(), zo.evaluator.leaving_model(zo.subspace, is_probe=False):
                return predict(*args, **kwargs)

        # In front of a subclass's own method, such as TRL's or the one that generates. Not around the loop, which may
        # prepare the model first and writes its parameters then.
        before = self.__dict__.get("prediction_step")
        self.__dict__["prediction_step"] = predict_at_present
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            del self.__dict__["prediction_step"]
            if before is not None:  # somebody has put it on this trainer alone
                self.__dict__["prediction_step"] = before

    def loss_by_rows(self, closure: Callable[[], Any], inputs: dict[str, Any]) -> GroupedLoss | None:
        """Return the loss of a batch in parts, for a subclass that knows them; None leaves it to `RowLosses` to show them.

        Args:
            closure: evaluates `compute_loss` for the batch; later calls leave no metrics.
            inputs: the batch.
        """
        return None

    def _clip_grad_norm(self, model: nn.Module) -> float:
        assert self.zo is not None
        self._no_backward.check_step()
        return self.zo.subspace.clip_gradient(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float | Tensor:
        assert self.zo is not None
        self._no_backward.check_step()
        self._no_backward.stepped()
        return self.zo.subspace.gradient_norm() if grad_norm is None else grad_norm

    # Logs.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the engine's numbers on lines that report a training loss or an evaluation.

        What `compute_loss` logs is logged once for a micro-batch, not once a probe.
        """
        if self.zo is not None and self._losses.repeats:
            return
        if self.zo is not None and "loss" in logs and self._estimate is not None:
            logs |= engine_logs(self.zo, self._estimate, self._monitor)
            if self._features is not None:
                logs["zo/layers_run"] = self._features.layers_run / self._features.layers_asked
            if self.args.world_size > 1:
                self._ranks.bytes_sent += 4  # Trainer averages the float32 loss that it is about to log
                logs["zo/bytes_communicated"] = self._ranks.bytes_sent
            if not self._estimate.is_finite:
                logs["loss"] = self._estimate.loss  # Trainer would log an average of earlier losses instead
        if self.zo is None or not reports_evaluation(logs):
            super().log(logs, *args, **kwargs)
            return
        logs["zo/forward_passes"] = self.zo.forward_passes
        super().log(logs, *args, **kwargs)
        del logs["zo/forward_passes"]  # evaluate returns these logs, and a hyperparameter search adds them up
