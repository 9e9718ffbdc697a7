"""Weights that are folded together, in pieces: against a fold of one weight at a time, element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zo_hf.rng import Purpose, Stream, draw_half_words
from zo_hf.rng import draw as draws
from zo_hf.rng.rounding import stochastic_round
from zo_hf.subspaces import LowRank, fold_pieces

STEP, SEED = 7, 3
DECAY = {"0.weight": 0.9, "2.bias": 0.8}


def model(dtype: torch.dtype) -> nn.Module:
    """Widths of which none is a multiple of a block of random bits."""
    generator = torch.Generator().manual_seed(0)
    made = nn.Sequential(nn.Linear(9, 13), nn.LayerNorm(13), Conv1D(11, 13), nn.Embedding(21, 10)).to(dtype)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made


def moved(dtype: torch.dtype) -> LowRank:
    """A subspace with coordinates away from zero."""
    space = LowRank(model(dtype), rank=2, seed=SEED)
    generator = torch.Generator().manual_seed(1)
    for coordinate in space.coordinates.values():
        coordinate.data = 1e-2 * torch.randn(coordinate.shape, generator=generator)
    return space


def expected(space: LowRank) -> dict[str, Tensor]:
    """W ← decay · W + B · Vᵀ of every weight on its own, all of its noise in one draw."""
    found = {}
    for site in space.sites:
        weight, coordinate = site.parameter.detach(), space.coordinates[site.name].detach()
        update = coordinate
        if site.name in space.factored:
            basis = space.basis(site.name).float()
            update = basis @ coordinate.t() if site.transposed else coordinate @ basis.t()
        bits = draw_half_words(Stream(SEED, STEP, purpose=Purpose.ROUNDING), site.name, 0, weight.numel())
        value = weight.float() * DECAY.get(site.name, 1.0) + update
        found[site.name] = stochastic_round(value, weight.dtype, bits.view(weight.shape))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [30, 150, 1 << 20], ids="{} elements at a time".format)
@pytest.mark.parametrize("launched", [False, True], ids=["on a CPU", "with launches"])
def test_pieces_give_the_bits_of_whole_weights(
    dtype: torch.dtype, tile: int, launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = moved(dtype)
    wanted = expected(space)
    monkeypatch.setattr(fold_pieces, "tile_elements", lambda device: tile)
    monkeypatch.setattr(draws, "is_launched", lambda device: launched)
    space.fold(STEP, DECAY)
    for site in space.sites:
        # A product of fewer rows may round differently in float32.
        assert torch.allclose(site.parameter, wanted[site.name], rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
    assert not any(coordinate.any() for coordinate in space.coordinates.values())


def test_a_copy_of_some_rows_is_that_part_of_a_fold() -> None:
    """As for a shard, and for an entry of a state dict."""
    space = moved(torch.bfloat16)
    wanted = expected(space)
    site = next(site for site in space.sites if site.name == "0.weight")
    rows = site.parameter.detach()[4:11].clone()
    space._fold_into(rows, 4 * 9, site, STEP, DECAY["0.weight"])
    assert torch.allclose(rows, wanted["0.weight"][4:11], rtol=0, atol=1e-6)


def test_infinity_in_a_weight_stays_and_reaches_no_other() -> None:
    space = moved(torch.bfloat16)
    wanted = expected(space)
    first = space.sites[0].parameter
    first.data[2, 3] = float("inf")
    space.fold(STEP, DECAY)
    assert first[2, 3] == float("inf")
    assert all(torch.equal(s.parameter, wanted[s.name]) for s in space.sites[1:])
