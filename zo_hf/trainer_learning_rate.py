"""`learning_rate="auto"`: batches for the search, the steps and the forward passes of the run, and where the rate goes."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from transformers import get_scheduler
from transformers.trainer_utils import has_length

from zo_hf import checkpoint
from zo_hf.budget import Budget
from zo_hf.distributed import Ranks
from zo_hf.stability.descent import ADAM
from zo_hf.stability.find_learning_rate import FoundRate, find_learning_rate
from zo_hf.stability.found_text import one_line
from zo_hf.stability.loss_probes import Batch
from zo_hf.stability.predicted_loss import CONSTANT, Schedule
from zo_hf.stability.rate_of_optimizer import check_findable
from zo_hf.zeroth_order import ZerothOrder

logger = logging.getLogger(__name__)

#: The schedule is looked at in so many pieces of a run, and in each at so many moments.
PIECES, MOMENTS = 32, 32
#: Schedules that follow what happens in a run, so that it cannot be said before how they multiply the rate.
_UNFORESEEN = ("reduce_lr_on_plateau", "greedy")

if TYPE_CHECKING:
    _TrainerLike = Any  # the mixin calls what Trainer has, and is no Trainer itself
else:
    _TrainerLike = object


class LearningRateMixin(_TrainerLike):
    """The part of `ZOTrainerMixin` that finds a learning rate.

    Attributes:
        found_learning_rate: what the last search has found; None where there was none.
    """

    args: Any
    model: Any
    zo: ZerothOrder | None
    optimizer: Any
    found_learning_rate: FoundRate | None = None
    _budget: Budget
    _ranks: Ranks
    _resumed_from: Path | None = None
    _finds_learning_rate = False

    def find_learning_rate(self) -> FoundRate:
        """Search as `train` would with `learning_rate="auto"`, and leave it at that.

        Raises:
            ValueError: the arguments are such that nothing can be found; the message names them.
        """
        given, self.args.learning_rate = self.args.learning_rate, "auto"
        self._resumed_from = None
        try:
            with self._budget.of(self.args, self._optimizer_divides()):
                *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
                self.create_optimizer()
                with self.accelerator.autocast():
                    self._find(steps)
        finally:
            self._finish_zeroth_order()
            self.args.learning_rate = given
        assert self.found_learning_rate is not None
        return self.found_learning_rate

    def _optimizer_divides(self) -> bool | None:
        """Whether the user's own optimizer is an Adam, as `Budget` has to know before the run; None if there is none."""
        if self.optimizer is not None:
            return type(self._torch_optimizer()) in ADAM
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs[0] in ADAM
        return None

    def _says_learning_rate(self) -> str:
        return "learning_rate='auto'" if self._finds_learning_rate else f"learning_rate={self.args.learning_rate:g}"

    def _check_findable(self, optimizer: Optimizer) -> None:
        """Refuse, before the first forward pass, what the search cannot work with."""
        assert self.zo is not None
        if self._sharding is not None:
            raise ValueError("learning_rate='auto' does not search with shards of a model (fsdp=...); give a number.")
        if self._users_groups is not None:
            raise ValueError(
                "learning_rate='auto' has no effect on optimizers=..., which come with their own; leave one of them out."
            )
        if self.args.max_grad_norm:
            raise ValueError(
                f"learning_rate='auto' does not know how long steps are that max_grad_norm={self.args.max_grad_norm} clips; "
                "use max_grad_norm=0, or give a number."
            )
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset) or not has_length(dataset):
            raise ValueError(
                "learning_rate='auto' draws batches from all of train_dataset, which has no length; give a number."
            )
        check_findable(self.zo, optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Trainer's, of the learning rate that is found just before: everything else that steps depend on is there."""
        if self._finds_learning_rate and self.zo is not None:
            self._finds_learning_rate = False
            rate = self._rate_of_checkpoint()
            if rate is None:
                rate = self._find(num_training_steps).learning_rate
            self.args.learning_rate = rate
            prepared = self._torch_optimizer()
            prepared.defaults["lr"] = rate
            for group in prepared.param_groups:
                group["lr"] = rate
        return super().create_scheduler(num_training_steps, optimizer)

    def _rate_of_checkpoint(self) -> float | None:
        """What the run that is resumed has found; None where it is none of this package's."""
        if self._resumed_from is None:
            return None
        state = checkpoint.read_state(self._resumed_from)
        if not state:
            return None
        if state.get("learning_rate") is None:
            raise ValueError(
                f"{self._resumed_from} is of a run whose learning_rate was not 'auto'; resume with the same number."
            )
        return float(state["learning_rate"])

    def _find(self, num_training_steps: int) -> FoundRate:
        assert self.zo is not None
        default = float(self.args.learning_rate or 0)
        steps = num_training_steps
        if self.args.zo_max_forward_passes is not None:
            steps = min(steps, self._budget.steps())
        schedule = self._schedule(num_training_steps, steps, default)
        forward_passes = self._budget.of_search(num_training_steps)
        with _undisturbed(self.model):
            draw = self._batches_to_search_with()
            found = find_learning_rate(
                self.zo, self._torch_optimizer(), draw, forward_passes, steps, default, schedule
            )
        # All ranks have measured the same bits; their processors need not agree on a square root.
        rate = torch.tensor(found.learning_rate, dtype=torch.float64)
        on_device = rate.to(self.args.device) if self.args.device.type != "mps" else rate
        self._ranks.take_from_first(on_device)
        found = self.found_learning_rate = replace(found, learning_rate=float(on_device))
        logger.info("learning_rate='auto': %s", one_line(found))
        for doubt in found.doubts:
            logger.warning("learning_rate='auto' is not sure: %s", doubt)
        return found

    def _schedule(self, num_training_steps: int, steps: int, rate: float) -> Schedule:
        """What the rate is multiplied by in the first `steps` of those that the schedule is made for."""
        args = self.args
        if args.lr_scheduler_type in _UNFORESEEN:
            return CONSTANT
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=rate)
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        assert isinstance(scheduler, LambdaLR)
        (multiple,) = scheduler.lr_lambdas
        count = PIECES * MOMENTS
        each = [float(multiple((2 * i + 1) * steps // (2 * count))) for i in range(count)]
        pieces = [each[i : i + MOMENTS] for i in range(0, count, MOMENTS)]
        return [(sum(piece) / MOMENTS, sum(m * m for m in piece) / MOMENTS) for piece in pieces]

    def _batches_to_search_with(self) -> Any:
        """A function that draws a step's micro-batches, without touching the order in which the run sees the data."""
        dataset, collate = self._columns_that_are_used()
        generator = torch.Generator().manual_seed(self.args.seed)
        micro_batches, rows = self.args.gradient_accumulation_steps, self._train_batch_size
        data, index = self._ranks.grid.data, self._ranks.grid.data_index

        def draw() -> Batch:
            order = torch.randperm(len(dataset), generator=generator).tolist()
            # As many on all ranks, and as many micro-batches as a step has, however few there are to draw from.
            own = list(itertools.islice(itertools.cycle(order), index, micro_batches * data * rows, data))
            parts = [own[i : i + rows] for i in range(0, len(own), rows)]
            batches = [collate([dataset[i] for i in part]) for part in parts]
            # Trainer's own: the budget has been asked before.
            batches, items = super(LearningRateMixin, self).get_batch_samples(
                iter(batches), len(batches), self.args.device
            )
            weight = 1.0 if self._loss_is_scaled(items) else 1.0 / len(batches)
            return [(self._closure(self.model, self._prepare_inputs(batch), items), weight) for batch in batches]

        return draw

    def _columns_that_are_used(self) -> tuple[Any, Any]:
        """The training data and the collator, one of them without the columns that the model does not take."""
        import datasets

        if isinstance(self.train_dataset, datasets.Dataset):
            return self._remove_unused_columns(self.train_dataset, description="training"), self.data_collator
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return self.train_dataset, collate


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; after, modes and all random generators are as they were before."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            model.eval()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes.items():
            module.training = mode
