"""The loss of a batch whose rows hold several sequences, packed end to end without padding.

A packed sequence is a row to everything that asks for directions by rows. Its tokens attend to each other alone, as
position_ids that restart, or the sequences' lengths, tell the model. Its share of the loss is that of its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.evaluation.model_loss import ModelLoss
from zo_hf.subspaces.packing import Packing


class PackedLoss:
    """The loss of one batch by sequences.

    Args:
        loss: the loss of the batch.
        sequence_of: the sequence of every position, int64 (rows, length), in ascending order from 0.

    Attributes:
        rows: the number of sequences.
    """

    def __init__(self, loss: ModelLoss, sequence_of: Tensor) -> None:
        self._loss, self._sequence_of = loss, sequence_of
        self.rows = int(sequence_of[-1, -1]) + 1

    def __call__(self) -> Tensor:
        """Return the loss at the current point, a scalar."""
        return self._loss()

    def by_groups(self, groups: int) -> Tensor:
        """Return the shares of groups of consecutive sequences in the loss, (groups,), from one forward pass.

        Raises:
            NotBatchable: the model's loss does not come apart.
        """
        return self._loss.by_groups(groups, self._group_of(groups))

    def packing(self, groups: int) -> Packing:
        """Return the division of the batch into groups of consecutive sequences, which differ by one at most."""
        return Packing(self._group_of(groups), self._loss.kept)

    def _group_of(self, groups: int) -> Tensor:
        return self._sequence_of * groups // self.rows


def packed(loss: Any) -> Any:
    """Return a model's loss as one of its packed sequences, and any other loss as it is."""
    if not isinstance(loss, ModelLoss):
        return loss
    sequence_of = sequences_of(loss.inputs)
    return loss if sequence_of is None else PackedLoss(loss, sequence_of)


def sequences_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the sequence of every position, int64 (rows, length), or None if every row is one.

    What precedes the first label of a row's next sequence belongs to the one before, because no direction can move
    its loss. Padding at the end of a row, where every position begins anew, is then no sequence either.

    Args:
        inputs: a batch with `labels`.
    """
    labels, positions = inputs["labels"], inputs.get("position_ids")
    if labels.ndim != 2 or inputs.get("attention_mask") is not None:
        return None
    rows, length = labels.shape
    begins = torch.zeros_like(labels, dtype=torch.bool)
    begins[:, 0] = True
    ends = inputs.get("cu_seq_lens_q")
    if isinstance(positions, Tensor) and positions.shape in (labels.shape, (1, length)):
        begins[:, 1:] |= positions.to(labels.device).diff(dim=1) != 1
    elif isinstance(ends, Tensor):
        begins.view(-1)[ends[:-1].long().to(labels.device)] = True
    if int(begins.sum()) == rows:
        return None
    # Each position predicts the label after it.
    is_target = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED
    sequence = begins.flatten().cumsum(0) - 1
    has_target = torch.zeros(int(sequence[-1]) + 1, dtype=torch.bool, device=labels.device)
    has_target[sequence[is_target.flatten()]] = True
    number = (has_target.cumsum(0) - 1).clamp(min=0)
    return number[sequence].view(rows, length)
