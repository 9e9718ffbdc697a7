"""Marked tensors: which operations leave rows apart, and what becomes of their sums."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from zo_hf.trl.row_tensor import RowSum, RowTensor, plain, row_sum, row_tensor

ROWS = 3

APART: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of rows": lambda x: x.sum(1).mean(),
    "sum over all": lambda x: x.sum() / 7,
    "mean over all": lambda x: -x.mean(),
    "slices": lambda x: x[:, -2:].sum(-1).mean() + 2 * x[..., 1:].mean(),
    "a function of rows": lambda x: F.logsigmoid(0.1 * x.sum(dim=1) - torch.arange(3.0)).mean(),
    "constants": lambda x: 1 - (1 - torch.sigmoid(x)).mean() + 0.5,
    "detached": lambda x: (x * x.exp().detach()).sum() / torch.tensor(5).clamp(min=1),
    "a term that is switched off": lambda x: x.mean() + 0.0 * torch.tensor(3.0),
    "in place": lambda x: x.sum(1).mean().add_((x**2).mean()).mul_(3),
    "log-softmax": lambda x: x.log_softmax(-1).gather(-1, torch.ones(ROWS, 1, dtype=torch.long)).sum(),
    "a mask": lambda x: -x[torch.ones(ROWS, 4).tril(1).bool()].mean(),
    "an expanded sum": lambda x: 2 * (x.mean() / 3).expand(ROWS).mean(),
    "other dtypes": lambda x: x.double().mean().float().to(torch.float32),
}

MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": lambda x: x.sum(1).sort()[0].mean(),
    "cumsum": lambda x: x.cumsum(0).mean(),
    "flip": lambda x: (x.flip(0) * x).mean(),
    "a mask of rows": lambda x: x[torch.tensor([True, False, True])].mean(),
    "a mask made from the rows": lambda x: x[x > 0].mean(),
    "one after another": lambda x: torch.stack([row + 1 for row in x]).mean(),
    "an expanded sum beside rows": lambda x: (x.sum(1) - x.mean().expand(ROWS)).mean(),
    "index": lambda x: x[torch.tensor([2, 0, 1])].mean(),
    "matrix product": lambda x: (torch.ones(3, 3) @ x).mean(),
    "transpose": lambda x: x[:, :ROWS].T.mean(1).mean(),
    "sum over rows": lambda x: x.sum(0).mean(),
    "broadcast": lambda x: (x.sum(1) + torch.ones(ROWS, ROWS)).mean(),
    "mixed beside rows": lambda x: (x.sum(1).sort()[0] - x.sum(1)).mean(),
    "mixed in place": lambda x: x.sum(1).add_(x.sum(1).sort()[0]).mean(),
    "the mean of all": lambda x: (x - x.mean()).mean(),
    "rows put elsewhere": lambda x: put_elsewhere(x.clone()).mean(),
    "maximum": lambda x: x.max(),
    "square of a sum": lambda x: x.mean() ** 2,
    "product of sums": lambda x: x.mean() * x.mean(),
    "a number over a sum": lambda x: 1 / x.mean(),
    "a term of the batch": lambda x: x.mean() + torch.tensor(0.5),
}


def put_elsewhere(x: Tensor) -> Tensor:
    x[0] = x[1] * 2
    return x


def values(rows: int = ROWS, length: int = 4) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", APART)
def test_shares_are_those_of_the_rows(name: str) -> None:
    loss, x = APART[name], values()
    found = loss(row_tensor(x.clone(), ROWS))
    assert isinstance(found, RowSum) and torch.equal(plain(found), loss(x.clone()))
    torch.testing.assert_close(found.shares.sum(), loss(x.clone()))
    for row in range(ROWS):
        moved = x.clone()
        moved[row] *= 1.5
        if name == "detached":
            continue
        other = loss(row_tensor(moved, ROWS)).shares - found.shares
        assert bool(other[row]) and not other[torch.arange(ROWS) != row].any()


@pytest.mark.parametrize("name", MIXED)
def test_other_operations_mix_the_rows(name: str) -> None:
    found = MIXED[name](row_tensor(values(), ROWS))
    assert isinstance(found, RowTensor) and found.rows == 0
    assert torch.equal(plain(found), MIXED[name](values()))


@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_halves_are_pairs(pairs: int, length: int, by_keyword: bool) -> None:
    x = values(2 * pairs, length)
    marked = row_tensor(x, pairs)
    chosen, rejected = marked.chunk(2, dim=0) if by_keyword else torch.chunk(marked, 2)
    found = (chosen - rejected).sum(1).mean()
    assert isinstance(found, RowSum)
    torch.testing.assert_close(found.shares, (x[:pairs] - x[pairs:]).sum(1) / pairs)
    assert not isinstance(marked.mean(), RowSum)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_a_packed_row_has_a_share_for_every_sequence(lengths: list[int]) -> None:
    row_of = torch.cat([torch.full((1, length), i) for i, length in enumerate(lengths)], 1)
    x = values(1, row_of.shape[1])
    found = (-2 * row_tensor(x, len(lengths), row_of)).sum() / 4
    expected = [-x[row_of == i].sum() / 2 for i in range(len(lengths))]
    torch.testing.assert_close(found.shares, torch.stack(expected))
    assert row_tensor(x, len(lengths), row_of)[:, :1].rows == 0


def test_sums_of_other_batches_do_not_add_up() -> None:
    assert not isinstance(
        row_sum(torch.tensor(1.0), torch.ones(2)) + row_sum(torch.tensor(1.0), torch.ones(3)), RowSum
    )
