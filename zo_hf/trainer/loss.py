"""The loss of a micro-batch as the engine evaluates it: `compute_loss`, or in parts if it is the model's own loss."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.known_losses import loss_kind
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss
from zo_hf.evaluation.output_loss import OutputLoss
from zo_hf.evaluation.row_losses import LossByRows
from zo_hf.parallel.ranks import Ranks
from zo_hf.subspaces import Full
from zo_hf.subspaces.peft_methods import adds_to_the_loss, base_model, tokens_in_front
from zo_hf.trainer.accumulation import CountTest, share_of_labels
from zo_hf.trainer.detach_test import DetachTest
from zo_hf.trainer.loss_calls import LossCalls
from zo_hf.trainer.loss_state import LossState
from zo_hf.trainer.micro_batch import MicroBatch
from zo_hf.trainer.objectives import depends_on_detached
from zo_hf.trainer.overrides import has_stock_contexts, has_stock_loss, overrides

logger = logging.getLogger(__name__)


class MicroBatchLosses:
    """Makes the closure of every micro-batch's loss, and its weight in the step's loss.

    Args:
        trainer: computes the loss, as its attributes and its `compute_loss` say.
        ranks: the processes that train together.
    """

    _counted = 0  # of the present step

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self._trainer, self._ranks = trainer, ranks
        self._checks, self._count_test = LossChecks(), CountTest(ranks.all_reduce_and)
        self._detach_test = DetachTest(ranks.all_reduce_and)
        self._detach_test.matters = depends_on_detached(trainer) or None
        self._state = LossState(trainer)
        self._row_input: Any = None
        self._knows_rows = False

    def of(
        self,
        model: nn.Module,
        batch: MicroBatch,
        counts: bool = True,
    ) -> tuple[Callable[[], Any], float | Tensor]:
        """Return the closure of a micro-batch's loss, and its weight.

        Args:
            model: the module to call, such as accelerate's wrapper of the model.
            batch: the micro-batch.
            counts: False if the loss leaves no metrics, as in a search before training.

        Raises:
            ValueError: the batch is a list or a tuple, and `compute_loss` is Trainer's, which takes a dict.
        """
        if not isinstance(batch.inputs, Mapping) and not overrides(self._trainer, "compute_loss"):
            raise ValueError(
                f"data_collator returns a {type(batch.inputs).__name__}, and Trainer's compute_loss calls the model with the "
                "names of a dict; return a dict, or override compute_loss."
            )
        with self._trainer.zo.evaluator.leaving_model(self._trainer.zo.subspace, runs=False):
            weight = self._weight(model, batch)  # may change what the closure passes on
            calls = self._calls(model, batch.num_items, counts)
            calls.at_current_point(batch.inputs, self._trainer.args.device)
        if calls.entries is not None and not self._knows_rows:
            self._find_rows(batch.named, calls.entries)
        zo = self._trainer.zo
        if zo.at_start_of_step:  # what the first step finds out is for the next ones, whose cost is known before
            self._counted = self.passes_beside
        zo.evaluator.forward_passes += self._counted
        return self._closure(model, batch, calls, self._checks), weight

    @property
    def repeats(self) -> bool:
        """True during an evaluation that leaves no effects, such as that of a second probe."""
        return self._state.repeats

    @property
    def passes_beside(self) -> int:
        """Forward passes that every micro-batch takes beside its probes, for values that the loss detaches."""
        return self._ranks.grid.directions if self._detach_test.matters and not self._state.is_stock else 0

    def _find_rows(self, inputs: Mapping[Any, Any], entries: int) -> None:
        """Note which input has as many rows as `RowLosses` has entries, if they are so on all ranks."""
        names = [k for k, v in inputs.items() if entries and isinstance(v, Tensor) and v.ndim and len(v) == entries]
        if self._ranks.all_reduce_and(torch.tensor(bool(names), device=self._trainer.args.device)):
            self._row_input = "labels" if "labels" in names else names[0]
        elif entries:
            logger.warning("RowLosses has %d entries, but not every process has an input with as many rows", entries)
        self._knows_rows = True

    def _calls(self, model: nn.Module, num_items: Tensor | int | None, counts: bool) -> LossCalls:
        def compute_loss(inputs: Any) -> Any:
            return self._trainer.compute_loss(model, inputs, num_items_in_batch=num_items)

        return LossCalls(compute_loss, self._trainer, self._detach_test, self._state, counts)

    def _closure(
        self, model: nn.Module, batch: MicroBatch, sequential: LossCalls, checks: LossChecks
    ) -> Callable[[], Any]:
        """Return the closure, which is a `ModelLoss` if probes can share a forward pass."""
        trainer, unwrapped = self._trainer, self._unwrapped(model)
        inputs, named, num_items = batch.inputs, batch.named, batch.num_items

        is_fused = self._is_models_own and "labels" in named and self._has_fused_loss(unwrapped)
        in_parts = (
            self._is_models_own
            and not is_fused
            and "labels" in named
            and isinstance(unwrapped, PreTrainedModel)
            and loss_kind(unwrapped) is not None
            and not self._state.batches.are_written
            and not adds_to_the_loss(trainer.model)
        )
        function = None if in_parts or is_fused else self._function_of_outputs(model, named)
        if function is not None:
            counts = num_items is not None and (
                trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
            )
            factor = self._factor if counts else 1
            return OutputLoss(model, inputs, function, sequential, num_items, factor)
        if not in_parts:
            more = {"skip_logits": True} if is_fused else {}

            def closure() -> Any:
                return sequential({**inputs, **more} if more else inputs)

            by_rows = trainer.loss_by_rows(closure, inputs)
            if by_rows is not None:
                return by_rows
            carrier = None if self._row_input is None else named.get(self._row_input)
            return closure if carrier is None else LossByRows(closure, len(carrier))
        assert isinstance(unwrapped, PreTrainedModel)
        counts = trainer.model_accepts_loss_kwargs and num_items is not None
        divides = counts and self._count_test.divides is not False
        return ModelLoss(
            model,
            unwrapped,
            inputs,
            sequential,
            num_items if divides else None,
            self._factor if counts else 1,
            tokens_in_front(trainer.model),
            checks,
            # Every chunk would draw the noise of the head again.
            divides=not isinstance(trainer.zo.subspace, Full),
            labels_on_host=batch.labels_on_host,
        )

    def _weight(self, model: nn.Module, batch: MicroBatch) -> float | Tensor:
        """Return the weight of a micro-batch's loss in the step's: 1 for a loss that divides by the step's labels."""
        trainer, num_items, micro_batches = self._trainer, batch.num_items, batch.of_step
        if trainer.loss_is_scaled_for_ga is not None:
            return 1.0 if trainer.loss_is_scaled_for_ga else 1.0 / micro_batches
        if num_items is None or not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
            return 1.0 if trainer.compute_loss_func is not None else 1.0 / micro_batches
        if micro_batches == 1 and self._factor == 1:
            return 1.0

        def loss_with(count: Any) -> Callable[[], Any]:
            # With checks of its own, because a loss that ignores the count is not yet known to.
            calls = self._calls(model, count, False)
            return self._closure(model, replace(batch, num_items=count), calls, LossChecks())

        self._count_test.see(loss_with, num_items, trainer.args.device)
        if self._count_test.divides is not False:
            return 1.0
        share = share_of_labels(self._unwrapped(model), batch.inputs, num_items) if self._is_models_own else None
        if share is not None:
            return share
        if type(trainer).compute_loss is not Trainer.compute_loss:
            trainer.model_accepts_loss_kwargs = (
                False  # Trainer.compute_loss, if a subclass calls it, adds no factor then
            )
            return 1.0 / micro_batches
        return 1.0 / micro_batches / self._factor

    def _function_of_outputs(self, model: nn.Module, inputs: Mapping[Any, Any]) -> Callable[..., Tensor] | None:
        """Return the function by which Trainer computes the loss from outputs and labels; None if there is none."""
        trainer = self._trainer
        has_labels = isinstance(inputs.get("labels"), Tensor) and inputs["labels"].ndim > 0
        if not has_labels or overrides(trainer, "compute_loss") or not has_stock_contexts(trainer):
            return None
        if self._state.batches.are_written:
            return None
        if trainer.compute_loss_func is not None:

            def function(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
                if self._detach_test.matters:
                    raise NotBatchable("the loss detaches values, which stay those of the whole batch")
                return trainer.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)

            return function
        if trainer.label_smoother is None:
            return None
        is_causal = self._unwrapped(model)._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return functools.partial(trainer.label_smoother, shift_labels=is_causal)

    @property
    def _is_models_own(self) -> bool:
        """True if `compute_loss` only returns the model's own loss."""
        trainer = self._trainer
        return has_stock_loss(trainer) and has_stock_contexts(trainer) and trainer.label_smoother is None

    @property
    def _factor(self) -> int:
        """The factor by which Trainer multiplies a loss that is divided by the labels on all processes."""
        return self._ranks.grid.data if self._trainer.args.average_tokens_across_devices else 1

    def _has_fused_loss(self, unwrapped: nn.Module) -> bool:
        """Return whether Liger computes the loss without logits, which in evaluation mode it does only when told to."""
        return (
            bool(self._trainer.args.use_liger_kernel)
            and "skip_logits" in inspect.signature(unwrapped.forward).parameters
        )

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return base_model(self._trainer.accelerator.unwrap_model(model, keep_torch_compile=False))
