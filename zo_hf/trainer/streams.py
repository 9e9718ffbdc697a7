"""Resuming in the middle of a stream of data that is shorter than the run.

A stream (an iterable data set) that ends starts again, as often as the run needs. Trainer takes a stream of unknown length
for one that never ends, so it would look for the last batch of a checkpoint in the first pass. Here a checkpoint holds the
number of finished passes, and of the batches read in the pass under way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from zo_hf import checkpoint
from zo_hf.trainer.replicas import ReplicaTrainer


class DataPosition(TrainerCallback):
    """Counts passes over the data, and the micro-batches of the pass under way.

    Attributes:
        passes: number of passes that have ended.
        batches: number of micro-batches of the pass under way in steps that have ended.
    """

    def __init__(self) -> None:
        self.passes, self.batches = 0, 0
        self._skipped, self._fetched = 0, 0
        self._has_begun = False

    def start(self, passes: int, batches: int) -> None:
        """Begin to count at a position."""
        self.passes, self._skipped, self._has_begun = passes, batches, False
        self._fetched = 0

    def fetched(self, batches: int) -> None:
        """Note the micro-batches of the step that begins; a checkpoint counts them when the step has ended."""
        self._fetched = batches

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the micro-batches of the step."""
        self.batches += self._fetched
        self._fetched = 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin a pass."""
        if self._has_begun:
            self.passes += 1
        self.batches = 0 if self._has_begun else self._skipped
        self._has_begun = True

    def to_saved(self) -> dict[str, int]:
        """Return the position as a checkpoint holds it."""
        return {"passes": self.passes, "batches": self.batches}


class StreamTrainer(ReplicaTrainer):
    """Overrides the hooks of Trainer that find the place of a checkpoint in the data."""

    _resumed_from: Path | None = None
    _dataloader: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._position = DataPosition()
        super().__init__(*args, **kwargs)
        self.add_callback(self._position)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Return Trainer's values."""
        self._dataloader = dataloader
        return super().set_initial_training_values(args, dataloader)

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """Return Trainer's micro-batches of a step."""
        batches, items = super().get_batch_samples(*args)
        self._position.fetched(len(batches))
        return batches, items

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        passes, batches = super()._init_training_state(*args, **kwargs)
        dataloader, self._dataloader = self._dataloader, None
        dataset = getattr(dataloader, "dataset", None)
        saved = {} if self._resumed_from is None else checkpoint.read_state(self._resumed_from).get("data")
        if saved and isinstance(dataset, IterableDataset) and not self.args.ignore_data_skip:
            passes, batches = saved["passes"], saved["batches"]
            if has_length(dataloader) and batches >= len(dataloader):
                passes, batches = passes + 1, 0
            # A stream that is told its pass can begin at any; another one may count its passes itself.
            if not hasattr(dataset, "set_epoch"):
                for _ in range(passes):
                    for _ in dataloader:
                        pass
        self._position.start(passes, batches)
        return passes, batches
