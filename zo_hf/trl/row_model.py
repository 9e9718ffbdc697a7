"""A model whose outputs know the rows of the batch, for a loss of TRL."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_hf.estimators.probe import NotBatchable
from zo_hf.trl.row_tensor import row_tensor
from zo_hf.trl.token_outputs import TokenOutputs, token_outputs


class RowModel:
    """A model as TRL's losses call it, with outputs that know the rows of the batch.

    Args:
        model: the module to call.
        unwrapped: the transformers model inside.
        rows: rows or pairs of the batch, or sequences packed into it.
        pairs: True if the batch has all chosen and then all rejected sequences. The model then sees each pair in two
            rows that follow each other, because they share a direction.
        sequence_of: the packed sequence of every position, int64 (1, length); None if rows are not packed.
    """

    def __init__(
        self, model: nn.Module, unwrapped: PreTrainedModel, rows: int, pairs: bool, sequence_of: Tensor | None
    ) -> None:
        self._model, self._unwrapped, self._rows, self._sequence_of = model, unwrapped, rows, sequence_of
        self._order = torch.arange(2 * rows).view(2, rows).T.flatten() if pairs else None

    def __call__(self, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Return the model's output, or `TokenOutputs` if TRL asks for its own head.

        Raises:
            NotBatchable: the output has terms of all rows together.
        """
        if inputs.get("output_router_logits"):
            raise NotBatchable("the loss of the router is one of all rows together")
        if self._order is not None:
            inputs = {name: self._ordered(value) for name, value in inputs.items()}
        if fused_lm_head:
            return self._token_outputs(inputs)
        outputs = self._model(**inputs)
        if self._sequence_of is None:
            outputs["logits"] = row_tensor(self._back(outputs["logits"]), self._rows)
        return outputs

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its config, which the loss of a subclass may read."""
        return getattr(self._model, name)

    def _token_outputs(self, inputs: dict[str, Any]) -> TokenOutputs:
        found = token_outputs(self._model, self._unwrapped, inputs)
        values = {field.name: self._back(getattr(found, field.name)) for field in fields(found)}
        row_of = None if self._sequence_of is None else self._sequence_of[:, :-1]
        return TokenOutputs(**values | {"log_probs": row_tensor(values["log_probs"], self._rows, row_of)})

    def _ordered(self, value: Any) -> Any:
        assert self._order is not None
        carries = isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self._order)
        return value[self._order.to(value.device)] if carries else value

    def _back(self, value: Tensor) -> Tensor:
        """Return a result in the order of TRL's batch."""
        return value if self._order is None else value[self._order.argsort().to(value.device)]
