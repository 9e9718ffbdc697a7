"""Small weights alone: which those are, that they are the same for probe and update, and masks that are given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import seeded, tiny_opt, weights_of
from tests.directions.test_every_distribution import Odd, whole
from tests.subspaces.helpers import sgd
from tests.trainer.runs import with_lora
from zo_hf.directions import GAUSSIAN, GivenMask, Sparse, sparse
from zo_hf.engine import ZerothOrder
from zo_hf.rng import Stream, draw_slice
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Adapter, Full

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


@DTYPES
def test_the_threshold_is_an_order_statistic(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_TILE", 700)
    weight = torch.randn(37, 61, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    weight[0, :5] = 0
    ordered = np.sort(weight.double().abs().flatten().numpy())
    for k in (1, 5, 6, 100, 564, weight.numel()):
        assert sparse.kth_magnitude(weight, k) == ordered[k - 1]


@DTYPES
def test_a_quarter_of_every_tensor_moves_and_it_is_the_smallest(dtype: torch.dtype) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 20, bias=False)), dtype)
    space = Full(model)
    drawer = Sparse(space.direction_context())
    drawer.begin()
    for name, z in whole(drawer, space).items():
        weight = space.coordinates[name].detach()
        g = draw_slice(Stream(3, 4, 1), name, 0, weight.numel(), GAUSSIAN).view(weight.shape)
        moves = z != 0
        assert torch.equal(z[moves], g[moves])
        assert moves.float().mean() == pytest.approx(0.25, abs=0.01 if dtype.itemsize > 2 else 0.05)
        assert weight[moves].abs().max() <= weight[~moves].abs().min()
    assert drawer.moving(Stream(0), space.dimension) == pytest.approx(space.dimension / 4)


def test_a_weight_that_has_grown_stays_and_the_threshold_is_the_starts() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    space = Full(model)
    drawer = Sparse(space.direction_context(), sparsity=0.5)
    drawer.begin()
    assert (whole(drawer, space)["weight"] != 0).tolist() == [[True, True, False, False]]
    model.weight.data = torch.tensor([[0.25, 0.2, 0.15, 0.4]], dtype=torch.float64)
    drawer.begin()
    assert (whole(drawer, space)["weight"] != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mask_of_an_update_is_that_of_its_probes(dtype: torch.dtype) -> None:
    """Though weight decay and the first direction carry weights across the threshold before the last is drawn."""
    model = seeded(lambda: nn.Linear(40, 30, bias=False), dtype)
    zo = ZerothOrder(model, "full", num_directions=3, direction="sparse")
    optimizer = zo.prepare(SeededSGD(zo.coordinates(10.0), zo.subspace, lr=0.02))
    zo.estimate(lambda: model(torch.ones(2, 40, dtype=dtype)).float().sum())
    z = [whole(zo.distribution, zo.subspace, Stream(0, 0, index))["weight"] for index in range(3)]
    before, pending = model.weight.detach().clone(), list(zo.subspace.pending)
    optimizer.step()
    expected = before.double() * 0.8
    for (_, c), direction in zip(pending, z, strict=True):
        expected -= 0.02 * c * direction.to(dtype).double()
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert torch.allclose(model.weight.double(), expected, rtol=rounding, atol=rounding)
    still = torch.stack(z).abs().sum(0) == 0
    assert 0.7 < still.float().mean() < 0.8
    threshold = zo.distribution.state()["weight"]
    assert ((before.abs() > threshold) & (model.weight.abs() <= threshold)).any(), "nothing crossed: the test is void"


def test_what_is_frozen_keeps_its_value_over_a_run() -> None:
    model = seeded(lambda: nn.Linear(40, 30, bias=False))
    before = weights_of(model)["weight"]
    zo = ZerothOrder(model, "full", direction="sparse")
    optimizer = sgd(zo, lr=1e-3)
    for _ in range(10):
        zo.estimate(lambda: model(torch.ones(2, 40)).square().sum())
        optimizer.step()
    moved = model.weight != before
    assert 0.2 < moved.float().mean() <= 0.26
    assert before[moved].abs().max() <= zo.distribution.state()["weight"]


def test_thresholds_are_in_the_state_and_win_over_the_weights() -> None:
    model = seeded(Odd)
    first = ZerothOrder(model, "full", direction="sparse")
    assert first.state_dict()["distribution"] == {}
    first.distribution.begin()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["distribution"].keys() == first.subspace.coordinates.keys()
    first.finish()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    second = ZerothOrder(model, "full", direction="sparse")
    second.load_state_dict(state)
    second.distribution.begin()
    assert second.state_dict()["distribution"] == state["distribution"]


def test_a_tensor_of_one_magnitude_moves_whole() -> None:
    """The ones of a norm and the zeros of a bias would else be frozen by their first step."""
    model = seeded(lambda: nn.Sequential(nn.Linear(40, 30, bias=False), nn.LayerNorm(30)))
    space = Full(model)
    drawer = Sparse(space.direction_context())
    drawer.begin()
    for parameter in (model[1].weight, model[1].bias):
        parameter.data.add_(0.3)
    z = whole(drawer, space)
    assert z["1.weight"].all() and z["1.bias"].all() and not z["0.weight"].all()


def test_coordinates_without_small_entries_are_refused() -> None:
    """Of a new LoRA, all that moves by default is zero."""
    model = with_lora(seeded(tiny_opt))
    with pytest.raises(
        ValueError, match=r"^zo_direction='sparse' .* the same magnitude; use zo_direction='gaussian', or"
    ):
        ZerothOrder(model, "adapter", direction="sparse")
    ZerothOrder(model, Adapter(model, target_modules=r".*lora_[AB].*"), direction="sparse")


# Given masks.


def masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in model.named_parameters() if n != "out.weight"
    }


@pytest.mark.parametrize("subspace", [Full, Adapter])
def test_a_given_mask_says_what_moves(subspace: type) -> None:
    model = seeded(Odd)
    before, chosen = weights_of(model), masks(model)
    space = subspace(model)
    zo = ZerothOrder(model, space, direction=GivenMask(space.direction_context(), chosen))
    optimizer = sgd(zo, lr=1e-2)
    for _ in range(3):
        zo.estimate(lambda: model(torch.arange(9)).square().sum())
        optimizer.step()
    for name, after in weights_of(model).items():
        expected = chosen.get(name, torch.zeros_like(after, dtype=torch.bool))
        assert torch.equal(after != before[name], expected), name
    assert not zo.subspace.reads.unread()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out.weight": torch.ones(2, 2, dtype=torch.bool)}, "give bool tensors"),
        ({"nowhere": torch.ones(3, 13, dtype=torch.bool)}, "give bool tensors"),
        ({"out.weight": torch.ones(3, 13)}, "give bool tensors"),
        ({"out.weight": torch.zeros(3, 13, dtype=torch.bool)}, "chooses no entry"),
    ],
)
def test_masks_that_do_not_fit_are_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"^masks .*{message}"):
        GivenMask(Full(seeded(Odd)).direction_context(), given)
