"""Batches that stay on the host until their step begins, where their labels can be read without a wait for the device.

accelerate's data loader moves a batch to the device before anyone sees it. Trainer moves it as well, if it has not been
moved, when a step begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

#: Methods of Trainer that get a batch before Trainer has moved it.
_FIRST_WITH_BATCHES = ("get_batch_samples", "training_step", "_prepare_inputs")


class HostBatchTrainer(Trainer):
    """Overrides the hooks of Trainer that move batches, and what they count of the labels."""

    args: Any

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's data loader, which leaves batches on the host."""
        dataloader = super().get_train_dataloader()
        # A dispatcher sends the batches of the first process to the others, and needs them on the device.
        is_alone = isinstance(dataloader, DataLoaderShard) and self.args.world_size == 1
        if is_alone and not any(map(self._is_overridden, _FIRST_WITH_BATCHES)):
            dataloader.device = None
        return dataloader

    def _is_overridden(self, method: str) -> bool:
        """Return whether a method of Trainer is a subclass's own, which may compute with the model's device."""
        owner = next(kind for kind in type(self).__mro__ if method in vars(kind))
        return owner.__module__.split(".")[0] not in ("transformers", "zo_hf")

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        if batch_samples and not isinstance(batch_samples[0], Iterable):
            raise ValueError(
                f"data_collator returns a {type(batch_samples[0]).__name__}, in which Trainer does not look for labels and "
                "tensors; return a dict."
            )
        are_here = all(labels_on_host(batch) is not None for batch in batch_samples)
        count = super()._get_num_items_in_batch(batch_samples, torch.device("cpu") if are_here else device)
        if not isinstance(count, Tensor) or count.device == device:
            return count
        # Not `to`, which copies from the host and waits.
        return torch.full(count.shape, count.item(), dtype=count.dtype, device=device)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self._is_overridden("_prepare_input"):
            return super()._prepare_inputs(inputs)
        try:
            return super()._prepare_inputs(inputs)
        except TypeError as error:
            raise ValueError(
                "Trainer makes every dict, list and tuple of a batch anew on the device, and a class of this batch does not "
                f"allow it ({error}); let data_collator return plain ones."
            ) from error


def labels_on_host(batch: Any) -> Tensor | None:
    """Return the labels of a batch if they are on the CPU; None if they are not, or if there are none."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return labels if isinstance(labels, Tensor) and labels.device.type == "cpu" else None
