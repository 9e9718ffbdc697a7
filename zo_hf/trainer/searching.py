"""A Trainer that searches for its learning rate before the first step, if the user has asked for "auto"."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from zo_hf.lr_finder.find import LRFinderResult
from zo_hf.trainer import changes, learning_rate
from zo_hf.trainer.micro_batch import MicroBatch
from zo_hf.trainer.rate_watch import RateWatch
from zo_hf.trainer.saving import SavingTrainer


class SearchingTrainer(SavingTrainer):
    """Overrides the hook of Trainer that makes the schedule, before which a search has everything that it needs.

    Attributes:
        found_learning_rate: the result of the last search; None without one.
    """

    found_learning_rate: LRFinderResult | None = None
    train_dataset: Any
    data_collator: Any
    _losses: Any
    _searches_only = False

    def find_learning_rate(self) -> LRFinderResult:
        """Search as `train` does with `learning_rate="auto"`, without training.

        Raises:
            ValueError: a search is not possible; the message names the argument and the way out.
        """
        self._resumed_from, self._searches_only = None, True
        try:
            with self._together(), self._spending(searches=True):
                self._forget_own_optimizer()
                *_, steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
                self.create_optimizer()
                with self.accelerator.autocast():
                    self._search(steps)
        finally:
            self._searches_only = False
            self._finish_zeroth_order()
        assert self.found_learning_rate is not None
        return self.found_learning_rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create Trainer's schedule, after a search for the learning rate, which needs everything else to exist."""
        if self.zo is None:
            self._adopt_optimizer()
        self._check_groups()
        rate = self._learning_rate
        if rate is not None and rate.awaits_search:
            rate.awaits_search = False
            of_checkpoint = learning_rate.rate_of_checkpoint(self._resumed_from)
            rate.value = self._search(num_training_steps).learning_rate if of_checkpoint is None else of_checkpoint
            learning_rate.set_learning_rate(self._torch_optimizer(), rate.value)
        self._rate_watch.begin(rate is not None and rate.is_searched, self.found_learning_rate)
        assert self.zo is not None
        self._run = changes.describe(
            self.zo, self._torch_optimizer(), self.args, num_training_steps, self.train_dataset
        )
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._keep_rate()
        return scheduler

    @property
    def _rate_watch(self) -> RateWatch:
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, RateWatch))

    def _search(self, num_training_steps: int) -> LRFinderResult:
        assert self.zo is not None and self._learning_rate is not None
        args, draw = self.args, self._drawer()
        self.found_learning_rate = learning_rate.search(
            self.zo,
            self._torch_optimizer(),
            lambda: self._step_losses(draw()),
            self._budget,
            args,
            num_training_steps,
            self._learning_rate.value,
        )
        return self.found_learning_rate

    def _drawer(self) -> Callable[[], list[Any]]:
        """Return a function that draws a step's micro-batches, from the loader of a subclass that makes one."""
        args, micro_batches = self.args, self.args.gradient_accumulation_steps
        if not self._is_overridden("get_train_dataloader"):
            dataset, collate = self._used_columns()
            grid, rows = self._ranks.grid, self._train_batch_size
            return learning_rate.step_batches(dataset, collate, grid, args.seed, micro_batches, rows)

        def batches() -> Iterator[Any]:
            loader = self.get_train_dataloader()
            while True:
                yield from loader

        endless = batches()
        return lambda: list(itertools.islice(endless, micro_batches))

    def _step_losses(self, batches: list[Any]) -> list[tuple[Any, float | Tensor]]:
        """Return a closure and a weight for each of a step's micro-batches."""
        # Trainer's own method, because the search has a budget of its own.
        batches, items = Trainer.get_batch_samples(self, iter(batches), len(batches), self.args.device)
        found = [MicroBatch(self._prepare_inputs(batch), items, len(batches)) for batch in batches]
        return [self._losses.of(self.model, batch, counts=False) for batch in found]

    def _used_columns(self) -> tuple[Any, Any]:
        """Return the training data and the collator; one of them removes columns that the model does not take."""
        import datasets

        if isinstance(self.train_dataset, datasets.Dataset):
            return self._remove_unused_columns(self.train_dataset, description="training"), self.data_collator
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return self.train_dataset, collate
