"""One micro-batch of a step, as Trainer hands it over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, and what is known of it beside its tensors.

    Args:
        inputs: what the data collator has returned, with its tensors on the model's device.
        num_items: the step's number of labels, see Trainer; None if it is unknown.
        of_step: number of micro-batches of the step.
        labels_on_host: the labels on the CPU, if they were there before the batch was moved.
    """

    inputs: Any
    num_items: Tensor | int | None
    of_step: int
    labels_on_host: Tensor | None = None

    @property
    def named(self) -> Mapping[Any, Any]:
        """The inputs by name, or by position if they are a list or a tuple."""
        return self.inputs if isinstance(self.inputs, Mapping) else dict(enumerate(self.inputs))
