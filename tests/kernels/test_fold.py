"""A fold in one launch has the bits of a plain one that adds its terms in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.conftest import fma
from tests.methods.table import DEVICE
from zo_hf import kernels
from zo_hf.rng import Purpose, Stream, draw_half_words
from zo_hf.rng.rounding import stochastic_round
from zo_hf.subspaces import fold_pieces
from zo_hf.subspaces.fold_pieces import Piece

pytest.importorskip("triton")

STREAM = Stream(7, 8, purpose=Purpose.ROUNDING)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SIZES = {"rows": st.integers(1, 40), "columns": st.integers(1, 40), "rank": st.integers(1, 9)}


def piece(dtype: torch.dtype, rows: int, columns: int, rank: int, first: int = 0, decay: float = 1.0) -> Piece:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).to(DEVICE, dtype)
    left = torch.randn(rows, rank, generator=generator).mul_(0.01).to(DEVICE)
    right = torch.randn(rank, columns, generator=generator).to(DEVICE).t()  # column-major, as bases are on a CPU
    return Piece(weight, left, right, "w", first, decay)


def in_order(it: Piece) -> Tensor:
    """The rows after a fold, whose sum takes one rounding a term."""
    assert it.right is not None
    left, right = it.left.cpu().numpy(), it.right.cpu().numpy()
    total = left[:, None, 0] * right[None, :, 0]
    for k in range(1, left.shape[1]):
        total = fma(left[:, None, k], right[None, :, k], total)
    value = it.rows.cpu().float() * np.float32(it.decay).item() + torch.from_numpy(total)
    uniform = draw_half_words(STREAM, it.name, it.first, it.first + value.numel()).view(value.shape)
    return stochastic_round(value, it.rows.dtype, uniform)


def folded(choice: str, it: Piece) -> Tensor:
    """The rows after a fold by kernels or by torch."""
    copy = Piece(it.rows.clone(), it.left, it.right, it.name, it.first, it.decay)
    kernels.choose(choice, DEVICE)
    try:
        fold_pieces.write([copy], STREAM)
    finally:
        kernels.choose("auto", DEVICE)
    return copy.rows


@EVERY_DTYPE
@settings(max_examples=20, deadline=None)
@given(**SIZES, first=st.integers(0, 50), decay=st.sampled_from([1.0, 0.99]))
def test_adds_in_order(dtype: torch.dtype, rows: int, columns: int, rank: int, first: int, decay: float) -> None:
    it = piece(dtype, rows, columns, rank, first, decay)
    assert torch.equal(folded("triton", it).cpu(), in_order(it))


@EVERY_DTYPE
def test_agrees_with_torch(dtype: torch.dtype) -> None:
    """Its matrix product may add in another order: within a rounding of float32, and of the weight where that tips it."""
    it = piece(dtype, 70, 33, 4, decay=0.99)
    torch.testing.assert_close(folded("triton", it), folded("torch", it), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@EVERY_DTYPE
def test_one_term_has_no_order(dtype: torch.dtype) -> None:
    it = piece(dtype, 50, 31, 1)
    assert torch.equal(folded("triton", it), folded("torch", it))


@EVERY_DTYPE
def test_a_vector(dtype: torch.dtype) -> None:
    it = piece(dtype, 77, 1, 1, first=13, decay=0.9)
    vector = Piece(it.rows.flatten(), it.left.flatten(), None, "b", 13, 0.9)
    assert torch.equal(folded("triton", vector), folded("torch", vector))


def test_the_update_of_a_copy_elsewhere_has_the_same_bits(chosen: None) -> None:
    """A copy on another device than the factors adds an update that the kernel has made."""
    it = piece(torch.float32, 20, 30, 4)
    expected = folded("triton", it)
    kernels.choose("triton", DEVICE)
    assert torch.equal(it.rows + fold_pieces._update(it), expected)
