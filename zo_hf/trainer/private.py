"""A Trainer whose training is differentially private: its batches, its secret, its account, and what it does not log.

The guarantee is about `train_dataset`. It covers all that leaves the training machine except checkpoints: the model, its card,
the trajectory and the log. Checkpoints hold the secret from which batches and noise follow, so they must stay there.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SchedulerType, has_length

from zo_hf.engine import ZerothOrder
from zo_hf.privacy import Guarantee, Secret
from zo_hf.privacy.accounting import check_installed, default_delta
from zo_hf.privacy.poisson import PoissonSampling
from zo_hf.trainer.budget import BudgetedTrainer
from zo_hf.trainer.overrides import overrides

logger = logging.getLogger(__name__)

#: The file of a checkpoint with the secret of its run.
SECRET_FILE = "zo_secret"
#: Steps beyond which nobody trains.
MOST_STEPS = 10_000_000
#: Numbers of Trainer's log that depend on the rows, without noise.
_MEASURED = ("loss", "train_loss", "total_flos")
#: Methods of a Trainer with which a subclass logs what it has seen of the rows.
_SEES_ROWS = ("log", "training_step", "get_batch_samples", "_prepare_inputs", "get_train_dataloader")
#: Arguments that a resumed run may change, if its learning rate does not depend on them.
_LENGTH = {"max_steps", "num_train_epochs", "zo_max_forward_passes", "number of steps"}


class PrivateBatches(Sampler[list[int]]):
    """The rows of every micro-batch of this process.

    A micro-batch that has no row gets one that does not count, because a collator needs one.

    Args:
        sampling: the rows of every step.
        micro_batches: number of micro-batches of a step on this process.
        processes: number of processes.
        rank: number of this process.

    Attributes:
        epoch: the pass over the data that the next iteration is.
    """

    def __init__(self, sampling: PoissonSampling, micro_batches: int, processes: int, rank: int) -> None:
        self._sampling, self._micro_batches, self._processes, self._rank = sampling, micro_batches, processes, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass, which Trainer counts from 0."""
        self.epoch = epoch

    def part(self, step: int, micro_batch: int) -> tuple[int, list[int]]:
        """Return the place in the step of a micro-batch's first row, and its rows."""
        return self._sampling.part(step, micro_batch * self._processes + self._rank)

    def counted(self, step: int, micro_batch: int) -> tuple[int, int]:
        """Return the place in the step of a micro-batch's first row, and the number of its rows; see `PrivateRows.part_of`."""
        first, rows = self.part(step, micro_batch)
        return first, len(rows)

    def __len__(self) -> int:
        return self._sampling.steps_per_epoch * self._micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self._sampling.steps_per_epoch
        for step in range(first, first + self._sampling.steps_per_epoch):
            for micro_batch in range(self._micro_batches):
                yield self.part(step, micro_batch)[1] or [0]


class PrivateLoader(DataLoader):
    """A data loader that tells its `PrivateBatches` which pass begins."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass, which Trainer counts from 0."""
        assert isinstance(self.batch_sampler, PrivateBatches)
        self.batch_sampler.set_epoch(epoch)


class EndsAtEpsilon(TrainerCallback):
    """Ends training before a step that would exceed `zo_dp_target_epsilon`.

    Attributes:
        steps: the number of steps that stay within it; None without a target.
    """

    def __init__(self) -> None:
        self.steps: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End training after the last step within the target."""
        if self.steps is not None and state.global_step >= self.steps:
            logger.info("training ends after %d steps: the next would exceed zo_dp_target_epsilon", state.global_step)
            control.should_training_stop = True


class PrivateTrainer(BudgetedTrainer):
    """Overrides the hooks of Trainer through which rows reach a step, or numbers about them leave it.

    Raises:
        ValueError: a part of the run would break the guarantee; the message names it.
    """

    _secret: Secret | None = None
    _batches: PrivateBatches | None = None
    _guarantee: Guarantee | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._end_at_epsilon = EndsAtEpsilon()
        if self._is_private:
            self._check_private()
            self.add_callback(self._end_at_epsilon)

    @property
    def _is_private(self) -> bool:
        return self.args.zo_dp_noise_multiplier is not None

    def _check_private(self) -> None:
        if self.args.zo_dp_noise_multiplier:
            check_installed()
        data = self.train_dataset
        if data is not None and (isinstance(data, IterableDataset) or not has_length(data)):
            raise ValueError(
                "zo_dp_noise_multiplier draws every row of train_dataset with the same probability, so it needs a length; load "
                "the data without streaming."
            )
        others = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        if data is not None and any(data is other for other in others):
            raise ValueError(
                "eval_dataset is train_dataset, whose losses zo_dp_noise_multiplier keeps private; evaluate on other rows."
            )
        for name in _SEES_ROWS:
            owner = next(kind for kind in type(self).__mro__ if name in vars(kind))
            if overrides(self, name) and owner.__module__.split(".")[0] != "zo_hf":
                raise ValueError(
                    f"{owner.__name__}.{name} may log what it sees of the rows, which zo_dp_noise_multiplier keeps private; use "
                    "ZOTrainer."
                )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; of private training, no loss is returned."""
        if not self._is_private:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._secret = self._shared_secret(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._secret = None
        return result._replace(training_loss=math.nan)

    def _shared_secret(self, checkpoint: str | None) -> Secret:
        secret = Secret()
        if checkpoint is not None:
            path = Path(checkpoint) / SECRET_FILE
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing, and without it a private run cannot draw the same noise again; copy it from the machine "
                    "that trained."
                )
            secret = Secret(path.read_bytes())
        key = torch.frombuffer(bytearray(secret.key), dtype=torch.uint8).to(self.args.device)
        self._ranks.broadcast(key)
        return Secret(bytes(key.tolist()))

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's data loader, or one of Poisson samples."""
        if not self._is_private or self._secret is None:
            return super().get_train_dataloader()
        args, data = self.args, self.train_dataset
        expected = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        parts = args.gradient_accumulation_steps * args.world_size
        sampling = PoissonSampling(self._secret, len(data), expected, parts)
        self._batches = PrivateBatches(sampling, args.gradient_accumulation_steps, args.world_size, args.process_index)
        delta = default_delta(len(data)) if args.zo_dp_delta is None else args.zo_dp_delta
        self._guarantee = Guarantee(args.zo_dp_noise_multiplier, len(data), expected, delta)
        if args.zo_dp_target_epsilon is not None:
            self._end_at_epsilon.steps = self._guarantee.steps_within(args.zo_dp_target_epsilon, MOST_STEPS)
            if not self._end_at_epsilon.steps:
                raise ValueError(
                    f"zo_dp_target_epsilon={args.zo_dp_target_epsilon} is below the epsilon of a single step, "
                    f"{self._guarantee.epsilon(1):.3g}; use more noise, or smaller batches."
                )
        # Trainer's own loader has the collator, the columns and the workers; only its sampler is another.
        loader = super().get_train_dataloader()
        return PrivateLoader(
            loader.dataset,
            batch_sampler=self._batches,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def _why_finished(self, max_steps: int) -> str | None:
        steps = self._end_at_epsilon.steps
        if steps is None or self.state.global_step < steps:
            return super()._why_finished(max_steps)
        return f"another step would exceed zo_dp_target_epsilon={self.args.zo_dp_target_epsilon:g}; raise it to go on"

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """Return Trainer's micro-batches of a step; in private training, no loss gets the count of all rows' labels."""
        batches, items = super().get_batch_samples(*args)
        return batches, None if self._is_private else items

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return Trainer's estimate; 0 in private training, because it counts tokens."""
        return 0 if self._is_private else super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does; in private training, epsilon and delta in place of what was measured without noise."""
        zo = self.zo
        if self._is_private and not any(name.startswith("eval_") for name in logs):
            for name in _MEASURED:
                logs.pop(name, None)
            if zo is not None and zo.private is not None and "zo/projected_grad" in logs:
                logs |= self._spent(zo)
        super().log(logs, *args, **kwargs)

    def _spent(self, zo: ZerothOrder) -> dict[str, float]:
        """Return epsilon so far and delta; nothing without noise, when epsilon is infinite."""
        guarantee = self._guarantee
        if guarantee is None or not guarantee.noise_multiplier:
            return {}
        return {"zo/dp_epsilon": guarantee.epsilon(zo.step), "zo/dp_delta": guarantee.delta}

    def _begin_private(self, zo: ZerothOrder) -> None:
        """Give the engine the run's secret, its batches and its guarantee."""
        if zo.private is None or self._secret is None:  # a search for the learning rate, which is refused next
            return
        assert self._batches is not None and self._guarantee is not None
        zo.private.secret, zo.private.part_of = self._secret, self._batches.counted
        zo.private.guarantee, zo.private.expected_rows = self._guarantee, self._guarantee.expected_rows

    def _save_secret(self, folder: Path) -> None:
        """Write the secret into a checkpoint, for its owner's eyes."""
        if self._secret is None or not self.args.should_save:
            return
        handle = os.open(folder / SECRET_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(self._secret.key)

    def _check_same_noise(self, changed: Mapping[str, Any], folder: Path) -> None:
        """Refuse to go on with other arguments: the same noise on other sums would show their difference.

        Raises:
            ValueError: an argument has changed; the message names it.
        """
        allowed = _LENGTH if self.args.lr_scheduler_type == SchedulerType.CONSTANT else set()
        name = next((name for name in changed if name not in allowed), None)
        if self._is_private and name is not None:
            raise ValueError(
                f"{folder} was written with {name}={changed[name][0]!r} and this run has {changed[name][1]!r}; in private "
                "training both would draw the same noise, whose difference hides nothing, so resume with the same value."
            )
