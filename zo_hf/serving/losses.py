"""The loss of a causal language model from the log-probabilities that a server gives.

    L = -1/n · Σ_rows Σ_t [label_t is no -100] · log p(label_t | tokens before t)

with n the number of labels of the batch, or of the step if Trainer counts them. It is the loss of transformers' causal
models, so a label is the row's own token, or -100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.evaluate import At
from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.serving.model import ServedModel
from zo_hf.subspaces import Subspace

_INPUTS = {"input_ids", "attention_mask", "labels"}


@dataclass(frozen=True)
class Row:
    """A row of a batch without its padding.

    Args:
        tokens: its tokens.
        labeled: positions of the tokens that are labels, each at least 1.
    """

    tokens: Sequence[int]
    labeled: Sequence[int]


def read_rows(inputs: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a batch.

    Args:
        inputs: `input_ids` and `labels`, and `attention_mask` if rows are padded, each int64 of shape (rows, length).

    Raises:
        ValueError: a server cannot compute the loss of this batch; the message says why.
    """
    others = sorted(inputs.keys() - _INPUTS)
    if others or "labels" not in inputs or "input_ids" not in inputs:
        named = f"has {others[0]}" if others else "has no labels or no input_ids"
        raise ValueError(
            f"a batch {named}, and server_url=... takes input_ids, attention_mask and labels; let data_collator return "
            "these."
        )
    ids, labels = inputs["input_ids"].cpu(), inputs["labels"].cpu()
    mask = inputs.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    counted = labels != IGNORED
    counted[:, 0] = False  # nothing predicts the first token
    first = kept & (kept.cumsum(1) == 1)
    if bool((counted & (first | ~kept)).any()):
        raise ValueError(
            "a label is a row's first token or padding, whose probability no server gives; let the tokenizer pad on the "
            "right, or set such labels to -100."
        )
    if bool((counted & (labels != ids)).any()):
        raise ValueError(
            "a label differs from the token at its position, and a server gives the probabilities of a row's own tokens; "
            "leave out server_url."
        )
    rows = []
    for tokens, here, label in zip(ids, kept, counted, strict=True):
        own = label[here].nonzero().flatten()
        rows.append(Row(tokens[here].tolist(), own.tolist()))
    return rows


class ServedLoss:
    """The loss of a batch at all probes of a step, a `JointLoss`.

    Args:
        served: evaluates the model.
        subspace: moves its adapter.
        inputs: the batch, see `read_rows`.
        num_items: divisor of the loss; None takes the number of the batch's labels.
    """

    def __init__(
        self, served: ServedModel, subspace: Subspace | None, inputs: Mapping[str, Any], num_items: Tensor | int | None
    ) -> None:
        self._served, self._subspace = served, subspace
        rows = read_rows(inputs)
        count = sum(len(row.labeled) for row in rows) if num_items is None else int(num_items)
        self._count = count
        # Rows without labels have no part in the loss.
        self._rows = [row for row in rows if row.labeled]
        self._ask = served.log_probabilities([row.tokens for row in self._rows])

    def __call__(self) -> Tensor:
        """Return the loss of the model as it is, (), float64."""
        return torch.tensor(self._loss(self._served.as_it_is(self._ask)), dtype=torch.float64)

    def losses_at(self, probes: Sequence[Probe], at: At) -> Tensor:
        """Return the losses at the probes, (len(probes),), float64."""
        assert self._subspace is not None
        found = self._served.at_probes(self._subspace, probes, at, [self._ask] * len(probes))
        return torch.tensor([self._loss(of_rows) for of_rows in found], dtype=torch.float64)

    def _loss(self, found: Sequence[Sequence[float]]) -> float:
        """Return the loss, given the log-probability of every token of every row but its first."""
        chosen = [of_row[i - 1] for of_row, row in zip(found, self._rows, strict=True) for i in row.labeled]
        return -math.fsum(chosen) / self._count if self._count else math.nan
