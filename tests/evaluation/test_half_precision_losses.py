"""Losses that transformers computes in half precision are computed in float32, so that their differences survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import VOCABULARY, seeded, tiny_bert
from tests.subspaces.helpers import loss_of
from zo_hf import ZerothOrder

ROWS = 4
HALF = (torch.bfloat16, torch.float16)


def one_label(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def several_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def regression(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - labels).square().mean()


KINDS = {
    "one label": (one_label, torch.tensor([0, 1, 1, 0])),
    "several labels": (several_labels, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])),
    "regression": (regression, torch.tensor([[0.5, 1.0], [1.0, -1.0], [0.25, 0.0], [1.0, 0.5]])),
}


def batch_of(labels: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (ROWS, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def classifier(dtype: torch.dtype, kind: str = "one label") -> Any:
    model = seeded(tiny_bert, dtype)
    if kind == "regression":
        model.config.problem_type = "regression"
    return model


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_computes_its_loss_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Alone, in the first evaluation and in a later one; with copies; and in shares of rows."""
    (function, labels), model = KINDS[kind], classifier(dtype, kind)
    batch = batch_of(labels.to(dtype) if labels.is_floating_point() else labels)
    with torch.no_grad():
        expected = function(model(**batch).logits.float(), labels).item()
        assert model(**batch).loss.dtype == dtype, "transformers computes it in half precision"
        loss = loss_of(model, batch)
        found = [loss(), loss(), loss.by_groups(ROWS).sum(), loss.by_groups(2).sum()]
        assert all(value.dtype == torch.float32 for value in found)
        assert [value.item() for value in found] == pytest.approx([expected] * 4, rel=1e-6)
        together = loss_of(model, batch).batched(2)
        assert together.dtype == torch.float32 and together[0] == together[1]
        assert together[0].item() == pytest.approx(expected, rel=torch.finfo(dtype).eps / 8)


@pytest.mark.parametrize("rows_per_direction", [0, 1])
def test_c_of_a_classifier_is_that_of_its_weights(rows_per_direction: int) -> None:
    """The resolution of bfloat16 at a loss of 0.7, 0.004, is far above the difference of two losses."""
    batch = batch_of(KINDS["one label"][1])

    def numbers(model: Any) -> Tensor:
        zo = ZerothOrder(model, "low_rank", seed=0, num_directions=1, rows_per_direction=rows_per_direction)
        found = []
        for zo.step in range(8):
            found += zo.estimate(loss_of(model, batch)).projected_gradients
        return torch.tensor(found)

    half = classifier(torch.bfloat16)
    slopes = numbers(classifier(torch.bfloat16).float())
    error = (numbers(half) - slopes).square().mean().sqrt() / slopes.square().mean().sqrt()
    assert 2 * 1e-3 * slopes.abs().max() < 0.004
    assert error < 0.2
