"""Layers drawn by what steps have found: the recursion, that an estimate stays unbiased, and that the steepest are found."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, seeded, weights_of
from tests.subspaces.helpers import sgd
from tests.trainer.runs import config
from zo_hf.directions import GAUSSIAN, AdaptiveLayers
from zo_hf.directions.adaptive_layers import WHOLE
from zo_hf.directions.options import DirectionOptions
from zo_hf.engine import ZerothOrder
from zo_hf.rng import Purpose, Stream, draw_half_words
from zo_hf.subspaces import Adapter, Full

LAYERS, WIDTH = 4, 3


class Blocks(nn.Module):
    """Half the squared distance of every block from 1, times its steepness; float64."""

    def __init__(self, steepness: tuple[float, ...] = (1.0,) * LAYERS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, 1, bias=False) for _ in range(LAYERS)]).double()
        self.steepness = steepness
        for block in self.blocks:
            nn.init.zeros_(block.weight)

    def forward(self) -> Tensor:
        eye = torch.eye(WIDTH, dtype=torch.float64)
        terms = [s * (block(eye) - 1).square().sum() / 2 for s, block in zip(self.steepness, self.blocks, strict=True)]
        return torch.stack(terms).sum()


def drawer(rewards: dict[str, float] | None = None, active: float = 0.5) -> AdaptiveLayers:
    made = AdaptiveLayers(Full(Blocks()).direction_context(1, DirectionOptions(active_layers=active)))
    made.load_state(rewards or {})
    return made


def names(rewards: list[float]) -> dict[str, float]:
    return {f"blocks.{i}": reward for i, reward in enumerate(rewards)}


# The formula.


@pytest.mark.parametrize(
    ("rewards", "scores"),
    [({}, [1, 1, 1, 1]), (names([2, 1, 0, 4]), [0.5, 0.25, 0, 1]), ({"blocks.1": 3.0}, [1, 1, 1, 1]),
     ({"blocks.1": 3.0, "blocks.0": 1.5}, [0.5, 1, 1, 1]), (names([0, 0, 0, 0]), [1, 1, 1, 1])],
)  # fmt: skip
def test_chances_are_those_of_a_softmax_mixed_with_a_tenth_for_all(rewards: dict, scores: list[float]) -> None:
    """A layer that was never drawn is as good as the best."""
    expected = 0.9 * torch.softmax(torch.tensor(scores, dtype=torch.float64) / 0.6, 0) + 0.1 / LAYERS
    assert [chance / WHOLE for chance in drawer(rewards).chances()] == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_run_is_the_recursion() -> None:
    """Layers, weights and Q of every step, from its c alone, written out a second time."""
    zo = ZerothOrder(Blocks((1.0, 5.0, 0.2, 1.0)), "full", direction="adaptive_layers", active_layers=0.5, seed=7)
    optimizer, q = sgd(zo, lr=1e-2), {}
    adaptive = zo.distribution
    assert isinstance(adaptive, AdaptiveLayers)
    for step in range(40):
        assert adaptive.state() == pytest.approx(q, rel=1e-8)
        best = max(q.values(), default=1.0)
        scores = torch.tensor([q.get(f"blocks.{i}", best) / best for i in range(LAYERS)], dtype=torch.float64)
        p = 0.9 * torch.softmax(scores / 0.6, 0) + 0.1 / LAYERS
        words = draw_half_words(Stream(7, step, purpose=Purpose.LAYERS), "layers", 0, 4).view(2, 2).double()
        uniform = (words[:, 0] * 2**16 + words[:, 1]) / 2**32
        drawn = Counter(torch.searchsorted(p.cumsum(0), uniform, right=True).tolist())
        w = {place: times / (2 * float(p[place])) for place, times in drawn.items()}
        (c,) = zo.estimate(zo.model).projected_gradients
        stream = Stream(7, step)
        assert adaptive.chosen(stream) == {f"blocks.{place}" for place in drawn}
        for place in range(LAYERS):
            expected = math.sqrt(w.get(place, 0.0))
            assert adaptive.weight(stream, f"blocks.{place}.weight") == pytest.approx(expected, rel=1e-8)
        reward = abs(c) / math.sqrt(sum(w.values()) / len(w))
        for place in drawn:
            name = f"blocks.{place}"
            q[name] = 0.9 * q[name] + 0.1 * reward if name in q else reward
        optimizer.step()


# What follows from it.


@pytest.mark.parametrize("rewards", [[4, 2, 1, 0], [0, 0, 0, 9]])
def test_directions_have_the_identity_for_a_covariance(rewards: list[float]) -> None:
    """However unequal the chances: a layer that is seldom drawn moves further when it is."""
    adaptive, steps = drawer(names(rewards)), 3000
    weights = [
        [adaptive.weight(Stream(3, step), f"blocks.{i}.weight") for i in range(LAYERS)] for step in range(steps)
    ]
    squares = torch.tensor(weights).square()
    error = squares.std(0) / steps**0.5
    assert ((squares.mean(0) - 1).abs() < 4.5 * error).all() and (error < 0.1).all()
    for i, weight in enumerate(weights[-1]):
        name, zeros, stream = f"blocks.{i}.weight", torch.zeros(WIDTH), Stream(3, steps - 1)
        expected = weight * GAUSSIAN.draw_slice(stream, name, 0, zeros)
        assert torch.equal(adaptive.draw_slice(stream, name, 0, zeros), expected)


def test_the_steepest_layer_is_drawn_most_and_no_layer_is_forgotten() -> None:
    model = Blocks((1.0, 1.0, 20.0, 1.0))
    zo = ZerothOrder(model, "full", direction="adaptive_layers", active_layers=0.25, seed=1)
    optimizer, counts = sgd(zo, lr=0.0), Counter()
    for step in range(300):
        zo.estimate(model)
        counts.update(zo.distribution.chosen(Stream(1, step)))
        optimizer.step()
    assert max(counts, key=counts.__getitem__) == "blocks.2" and counts["blocks.2"] > 1.5 * 300 / LAYERS
    assert min(counts.values()) > 0.2 * 300 / LAYERS and len(counts) == LAYERS


def test_it_converges_where_layers_differ() -> None:
    model = Blocks((1.0, 1.0, 10.0, 0.3))
    before = model().item()
    zo = ZerothOrder(model, Adapter(model), direction="adaptive_layers", active_layers=0.5)
    optimizer = sgd(zo, lr=1e-2)
    for _ in range(600):
        zo.estimate(model)
        optimizer.step()
    assert model().item() < 0.05 * before


# When a step counts.


def test_a_step_that_is_skipped_or_estimated_again_counts_once_or_not_at_all() -> None:
    ends = []
    for times in (1, 3):
        model = Blocks()
        zo = ZerothOrder(model, "full", direction="adaptive_layers", active_layers=0.5)
        optimizer = sgd(zo, lr=1e-2)
        for step in range(6):
            if step == 3:
                before = zo.distribution.state()
                zo.estimate(lambda model=model: model() * math.nan)
                assert zo.distribution.state() == before
            else:
                for _ in range(times):
                    zo.estimate(model)
            optimizer.step()
        ends.append((weights_of(model), zo.distribution.state()))
    assert_same_bits(*(weights for weights, _ in ends))
    assert ends[0][1] == ends[1][1]


def test_a_step_has_the_layers_of_what_was_known_before_it() -> None:
    """In full, noise for the update is drawn when the step's c is known already; in a replay, it is all there is."""
    adaptive = drawer(names([1.0, 1.0, 1.0, 1.0]))
    chosen = [set(adaptive.chosen(Stream(0, step))) for step in range(20)]
    replayed = drawer(names([1.0, 1.0, 1.0, 1.0]))
    for step in range(20):
        replayed.load_state(names([1.0, 1.0, 1.0, 1.0]))
        replayed.observe(Stream(0, step), [1e6])
        assert replayed.chosen(Stream(0, step)) == chosen[step]
    assert any(a != b for a, b in pairwise(chosen))


def test_the_fraction_of_layers_is_taken_and_one_layer_refused(tmp_path) -> None:
    assert config(tmp_path, zo_direction="adaptive_layers", zo_active_layers=0.5).zo_active_layers == 0.5
    space = Full(seeded(Blocks), target_modules=r"blocks\.1\..*")
    with pytest.raises(ValueError, match=r"^zo_direction='adaptive_layers' chooses among layers"):
        AdaptiveLayers(space.direction_context())


def test_the_length_of_a_step_counts_the_weights_of_its_layers() -> None:
    model = nn.ModuleList(nn.Linear(64, 16, bias=False) for _ in range(LAYERS))
    distribution = AdaptiveLayers(Full(model).direction_context(1, DirectionOptions(active_layers=0.5)))
    coordinates = dict(model.named_parameters())
    dimension = sum(p.numel() for p in coordinates.values())
    for step in range(8):
        stream = Stream(0, step)
        z = [distribution.draw_slice(stream, name, 0, p.detach().flatten()) for name, p in coordinates.items()]
        length = float(sum(part.square().sum() for part in z))
        assert length == pytest.approx(distribution.moving(stream, dimension), rel=0.1)
