"""TRL's own losses by rows, or at several probes at once: TRL computes them, from a model whose outputs know either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.model_loss import only_labeled_logits
from zo_hf.evaluation.packed_loss import PackedLoss, sequences_of
from zo_hf.evaluation.row_losses import GroupedLoss, LossByRows, RowLosses
from zo_hf.subspaces.peft_methods import base_model, tokens_in_front
from zo_hf.trl.row_model import RowModel
from zo_hf.trl.row_tensor import RowSum
from zo_hf.trl.shared_forward import LossAtProbes, SharedForward

# Inputs of text. Others, such as pixels, may have another number of rows.
_OF_TEXT = "input_ids attention_mask position_ids token_type_ids labels completion_mask use_cache margin"
_OF_TEXT += " ref_chosen_logps ref_rejected_logps cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx"


@dataclass
class _Asked:
    """The wishes of a step for the loss: its rows, or the outputs of a shared forward pass.

    It is no attribute of the trainer itself, all of which are put back before every evaluation of the loss.
    """

    rows: bool = False
    shared: SharedForward | None = None


class ByRows:
    """A trainer of TRL whose loss comes apart by rows; a base that stands before the trainer's class.

    Attributes:
        has_pairs: True if a batch has all chosen and then all rejected sequences, and one loss for each pair.
    """

    has_pairs = False
    _asked: _Asked

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a trainer; warnings of the trainer's `__init__` still point to the line that calls it."""
        trainer = super().__new__(cls)
        trainer._asked = _Asked()
        return trainer

    def loss_by_rows(self: Any, closure: Callable[[], Any], inputs: dict[str, Any]) -> GroupedLoss | None:
        """Return the loss of a batch in parts, or None if it is of another kind than text; see `ZOTrainer`."""
        unwrapped = self._unwrapped_model(self.model)
        of_text = set(inputs) <= set(_OF_TEXT.split())
        if not of_text or tokens_in_front(self.model) or not isinstance(unwrapped, PreTrainedModel):
            return None
        (rows, sequence_of), model_rows = self._rows_in(inputs), len(inputs["input_ids"])

        def by_rows() -> Any:
            with self._tracing_rows():
                return closure()

        if sequence_of is None:
            return LossAtProbes(self._sharing_forward, by_rows, rows, closure, model_rows)
        if model_rows > 1:
            return None
        kept = only_labeled_logits(unwrapped, inputs).get("logits_to_keep")
        return PackedLoss(LossByRows(by_rows, rows, closure, kept=kept), sequence_of)

    def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss; while a step asks for its rows, return it as `RowLosses`.

        Raises:
            NotBatchable: a step asks for the rows of a loss that mixes them.
        """
        if self._asked.shared is not None:
            model = self._asked.shared.of(model, self._unwrapped_model(model))
        if not self._asked.rows:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        rows, sequence_of = self._rows_in(inputs)
        by_rows = RowModel(model, self._unwrapped_model(model), rows, self.has_pairs, sequence_of)
        loss = super().compute_loss(by_rows, inputs, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(loss, RowSum) or len(loss.shares) != rows:
            raise NotBatchable("the loss is one of all rows together")
        return RowLosses(loss.shares * rows)

    def _rows_in(self, inputs: dict[str, Any]) -> tuple[int, Tensor | None]:
        """Return the number of rows, pairs or packed sequences, and the sequence of every position if they are packed."""
        rows = len(inputs["input_ids"])
        if self.has_pairs:
            return rows // 2, None
        sequence_of = sequences_of(inputs)
        return (rows, None) if sequence_of is None else (int(sequence_of[-1, -1]) + 1, sequence_of)

    @contextmanager
    def _sharing_forward(self, shared: SharedForward) -> Iterator[None]:
        self._asked.shared = shared
        try:
            yield
        finally:
            self._asked.shared = None

    @contextmanager
    def _tracing_rows(self) -> Iterator[None]:
        self._asked.rows = True
        try:
            yield
        finally:
            self._asked.rows = False

    def _unwrapped_model(self: Any, model: nn.Module) -> Any:
        return base_model(self.accelerator.unwrap_model(model, keep_torch_compile=False))
