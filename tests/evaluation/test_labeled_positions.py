"""The positions that need a logit, and where they are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.fake_cuda import CUDA, fake_cuda
from zo_hf.evaluation.known_losses import IGNORED
from zo_hf.evaluation.labeled_positions import labeled_positions

LENGTH = 12


def _labels(*rows: dict[int, int]) -> Tensor:
    """Labels by their positions, of every row."""
    labels = torch.full((len(rows), LENGTH), IGNORED)
    for row, given in zip(labels, rows, strict=True):
        for position, token in given.items():
            row[position] = token
    return labels


CASES = {
    "last": (_labels({11: 3}, {11: 4}), [10]),
    "spans of rows": (_labels({4: 3, 5: 6}, {9: 4}), [3, 4, 8]),
    "first": (_labels({0: 3, 1: 4}), [0]),
}


@pytest.mark.parametrize(("labels", "expected"), CASES.values(), ids=CASES)
def test_positions_of_any_row_and_their_tokens(labels: Tensor, expected: list[int]) -> None:
    found = labeled_positions(labels)
    assert found is not None
    positions, targets = found
    assert positions.tolist() == expected
    assert torch.equal(targets, labels[:, [position + 1 for position in expected]])


@pytest.mark.parametrize("labels", [_labels({}), _labels({0: 3}), torch.zeros(2, LENGTH, dtype=torch.int64)])
def test_none_or_most(labels: Tensor) -> None:
    assert labeled_positions(labels) is None


@pytest.mark.parametrize(("labels", "expected"), CASES.values(), ids=CASES)
def test_labels_on_the_host_keep_it_from_waiting(labels: Tensor, expected: list[int]) -> None:
    with fake_cuda() as counts:
        there = torch.zeros(labels.shape, dtype=torch.int64, device=CUDA)
        counts.clear()
        found = labeled_positions(there, labels)
        assert found is not None
        assert found[0].device == found[1].device == CUDA
        assert found[0].shape == (len(expected),) and found[1].shape == (len(labels), len(expected))
        assert counts.total[1:] == (0, 0)
        labeled_positions(there)
        assert counts.total[1:] == (1, 0)


@pytest.mark.parametrize("numbers", [[4], [2, 3, 4], [0, 2, 3, 7], [1, 3, 5]])
def test_runs_of_numbers_are_made_in_order(numbers: list[int]) -> None:
    from zo_hf.evaluation.labeled_positions import _made_on

    assert _made_on(torch.device("cpu"), numbers).tolist() == numbers
