"""The engine without a Trainer: any module, any closure, any optimizer."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, seeded, weights_of
from tests.quantized_models import dequantized
from tests.subspaces.helpers import EVERY_SUBSPACE, UNQUANTISED, direction, with_scales
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.rules import ScalarNormalization, SeededSGD
from zo_hf.subspaces import SUBSPACES, Full

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr),
    "momentum": lambda groups, lr: torch.optim.SGD(groups, lr=lr / 10, momentum=0.9),
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
}


class Mixed(nn.Module):
    """One of each: an embedded token and a small picture give a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 4)

    def forward(self, tokens: Tensor, pictures: Tensor) -> Tensor:
        x = self.embed(tokens) + self.conv(pictures).flatten(1)
        return self.out(self.norm(x))


def mixed_task(subspace: str = "low_rank", seed: int = 0) -> tuple[Mixed, Callable[[], Tensor]]:
    """A regression whose targets come from another model of the same kind, which the subspace can reach."""
    model, teacher = with_scales(subspace, seeded(Mixed, seed=seed)), seeded(Mixed, seed=seed + 1)
    generator = torch.Generator().manual_seed(7)
    if subspace == "norms":
        teacher = copy.deepcopy(model)
        for parameter in (p for p in teacher.parameters() if p.ndim < 2):
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    if subspace == "scales":
        teacher = dequantized(model)
        teacher.out.weight.data.mul_(torch.randn(4, 1, generator=generator).exp())
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 6, (32,), generator=generator)
    pictures = torch.randn(32, 1, 4, 4, generator=generator)
    with torch.no_grad():
        target = teacher(tokens, pictures)
    return model, lambda: (model(tokens, pictures) - target).square().mean()


def engine(
    model: nn.Module, subspace: str, lr: float, optimizer: str = "sgd", weight_decay: float = 0.0, **kwargs
) -> tuple[ZerothOrder, torch.optim.Optimizer]:
    options = {"rank": 2, "fold_steps": 8} if subspace in ("low_rank", "core") else {}
    seed = kwargs.pop("seed", 0)
    zo = ZerothOrder(model, SUBSPACES[subspace](model, seed=seed, **options), seed=seed, **kwargs)
    groups = zo.coordinates(weight_decay)
    if isinstance(zo.subspace, Full):
        return zo, zo.prepare(SeededSGD(groups, zo.subspace, lr=lr))
    return zo, zo.prepare(OPTIMIZERS[optimizer](groups, lr))


# Learning.


# Small weights alone, and a layer at a time, are slower or do not reach as far.
REACHING = [name for name in DISTRIBUTIONS if name not in ("sparse", "layers", "adaptive_layers")]


@pytest.mark.parametrize(
    ("subspace", "direction_name"),
    [*((name, "gaussian") for name in SUBSPACES), *(("low_rank", name) for name in REACHING if name != "gaussian")],
)
def test_a_regression_on_every_kind_of_layer_converges(subspace: str, direction_name: str) -> None:
    model, loss = mixed_task(subspace)
    before = loss().item()
    zo, optimizer = engine(model, subspace, 3e-2, num_directions=2, direction=direction_name)
    for _ in range(100):
        zo.estimate(loss)
        optimizer.step()
    zo.finish()
    assert loss().item() < 0.25 * before


@pytest.mark.parametrize(
    ("subspace", "optimizer"),
    [("low_rank", "momentum"), ("low_rank", "adamw"), ("adapter", "momentum"), ("core", "adamw"), ("scales", "adamw")],
)
def test_torch_optimizers_learn_from_the_estimate(subspace: str, optimizer: str) -> None:
    """Momentum and AdamW work on `.grad` as they are, across folds of the coordinates; plain SGD is in the test above."""
    model, loss = mixed_task(subspace)
    before = loss().item()
    zo, stepper = engine(model, subspace, 3e-2, optimizer, num_directions=2)
    for _ in range(125):
        zo.estimate(loss)
        stepper.step()
        stepper.zero_grad()
    zo.finish()
    assert loss().item() < 0.25 * before


@pytest.mark.parametrize("subspace", UNQUANTISED)  # in scales, which are factors, it is none
def test_a_quadratic_reaches_its_minimum(subspace: str) -> None:
    """Central differences are exact on a quadratic, so that it converges geometrically, to rounding."""
    model = seeded(lambda: nn.Linear(3, 2), torch.float64)
    best = seeded(lambda: nn.Linear(3, 2), torch.float64, seed=1)
    if subspace == "norms":
        best.weight = model.weight
    x = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = best(x).detach()
    zo, optimizer = engine(model, subspace, 0.2, num_directions=4)
    for _ in range(150):
        zo.estimate(lambda: (model(x) - target).square().mean())
        optimizer.step()
    zo.finish()
    assert torch.allclose(model.weight, best.weight, atol=1e-3)
    assert torch.allclose(model.bias, best.bias, atol=1e-3)


# Determinism and state.


def run(subspace: str, steps: int, **kwargs) -> tuple[dict[str, Tensor], list[float]]:
    model, loss = mixed_task(subspace)
    zo, optimizer = engine(model, subspace, 1e-2, "momentum", **kwargs)
    losses = []
    for _ in range(steps):
        losses.append(zo.estimate(loss).loss)
        optimizer.step()
    zo.finish()
    return weights_of(model), losses


@EVERY_SUBSPACE
def test_the_seed_decides_everything(subspace: str) -> None:
    """Bit for bit again whatever the global generator does, which is left alone, and otherwise with another seed."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = run(subspace, 10, seed=1, num_directions=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = run(subspace, 10, seed=1, num_directions=2)
    assert_same_bits(first[0], again[0])
    assert first[1] == again[1]
    other = run(subspace, 10, seed=2, num_directions=2)
    assert first[1] != other[1]


@EVERY_SUBSPACE
def test_state_dict_round_trip_continues_bit_exactly(subspace: str) -> None:
    """Engine, optimizer, weights and coordinates put into a new engine between two folds."""

    def steps(zo: ZerothOrder, optimizer: torch.optim.Optimizer, loss: Callable, count: int) -> None:
        for _ in range(count):
            zo.estimate(loss)
            optimizer.step()

    kwargs = {"normalize": True, "weight_decay": 0.1, "num_directions": 2, "optimizer": "adamw"}
    model, loss = mixed_task(subspace)
    zo, optimizer = engine(model, subspace, 1e-2, **kwargs)
    steps(zo, optimizer, loss, 11)
    weights, state, optimizer_state = copy.deepcopy((weights_of(model), zo.state_dict(), optimizer.state_dict()))
    coordinates = {name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}
    at = getattr(zo.subspace, "drawn_at", None)
    steps(zo, optimizer, loss, 7)  # past the next fold
    zo.finish()

    resumed, resumed_loss = mixed_task(subspace)
    for name, tensor in resumed.state_dict().items():  # live, where bitsandbytes would refuse to load
        tensor.copy_(weights[name])
    zo2, optimizer2 = engine(resumed, subspace, 1e-2, **kwargs)
    with torch.no_grad():
        for name, coordinate in zo2.subspace.coordinates.items():
            coordinate.copy_(coordinates[name])
    if at is not None:
        zo2.subspace.draw_bases(at)
        zo2.subspace.coordinates_changed()
    zo2.load_state_dict(state)
    assert zo2.state_dict() == state
    optimizer2.load_state_dict(optimizer_state)
    steps(zo2, optimizer2, resumed_loss, 7)
    zo2.finish()
    assert_same_bits(weights_of(resumed), weights_of(model))
    assert zo2.state_dict() == zo.state_dict()


def test_state_is_plain_numbers() -> None:
    """So that it can be written as JSON and is not pickled."""
    model, loss = mixed_task()
    zo, optimizer = engine(model, "low_rank", 1e-2, normalize=True, weight_decay=0.1)
    zo.estimate(loss)
    optimizer.step()
    assert json.loads(json.dumps(zo.state_dict())) == zo.state_dict()
    assert zo.state_dict()["pending_decay"]


# What a step does.


@EVERY_SUBSPACE
@pytest.mark.parametrize("directions", [1, 3])
def test_the_estimate_reports_the_losses_at_the_probes(subspace: str, directions: int) -> None:
    """Their mean, and (ℓ₊ - ℓ₋)/2ε of each direction, + first."""
    model, loss = mixed_task(subspace)
    seen: list[float] = []

    def closure() -> Tensor:
        seen.append(loss().double())
        return seen[-1]

    zo, _ = engine(model, subspace, 1e-2, num_directions=directions, eps=0.01)
    estimate = zo.estimate(closure)
    assert len(seen) == 2 * directions == zo.evaluator.forward_passes
    assert estimate.loss == pytest.approx(sum(seen).item() / len(seen), rel=1e-12)
    expected = [(plus - minus).item() / 0.02 for plus, minus in zip(seen[::2], seen[1::2], strict=True)]
    assert estimate.projected_gradients == pytest.approx(expected, rel=1e-9)
    assert estimate.is_finite


@EVERY_SUBSPACE
def test_directions_of_a_step_are_averaged(subspace: str) -> None:
    """One SGD step moves the coordinates by -η/q · Σ cᵢ·zᵢ."""
    model, loss = mixed_task(subspace)
    zo, optimizer = engine(model, subspace, 1e-2, num_directions=5)
    before = {name: c.detach().clone() for name, c in zo.subspace.coordinates.items()}
    estimate = zo.estimate(loss)
    optimizer.step()
    z = [direction(zo.subspace, index=i) for i in range(5)]
    for name, coordinate in zo.subspace.coordinates.items():
        mean = sum(c * zi[name] for c, zi in zip(estimate.projected_gradients, z, strict=True)) / 5
        assert torch.allclose(coordinate, before[name] - 1e-2 * mean, atol=1e-6), name


@EVERY_SUBSPACE
def test_micro_batches_add_up_to_the_step(subspace: str) -> None:
    """Two halves with weight ½ give the estimate of the whole: probes are at the same points for each."""
    model = with_scales(subspace, seeded(lambda: nn.Sequential(nn.Linear(5, 4)), torch.float64))
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zo, _ = engine(model, subspace, 0.0, num_directions=2)
    whole = zo.estimate(lambda: model(x).sin().mean())
    for part in x.chunk(2):
        zo.probe(lambda part=part: model(part).sin().mean(), weight=0.5)
    parts = zo.finish_estimate()
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert parts.projected_gradients == pytest.approx(whole.projected_gradients, rel=1e-6)
    zo.probe(lambda: model(x).sum() * 1000)
    zo.discard()
    assert zo.estimate(lambda: model(x).sin().mean()) == whole


def test_other_ranks_enter_as_scalars_before_anything_is_divided() -> None:
    class TwoRanks(Ranks):
        """The other rank found three times our losses, in the opposite order."""

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.stack([tensor, 3 * tensor.flip(0)])

    model, loss = mixed_task()
    zo, _ = engine(model, "low_rank", 0.0, num_directions=2, ranks=TwoRanks(Grid(data=2)))
    losses = zo.probe(loss)
    assert losses.shape == (4,) and losses.dtype == torch.float64
    estimate = zo.finish_estimate()
    mixed = (losses + 3 * losses.flip(0)) / 2
    expected = [(mixed[0] - mixed[1]).item() / 2e-3, (mixed[2] - mixed[3]).item() / 2e-3]
    assert estimate.projected_gradients == pytest.approx(expected)


# Normalization.


def test_scalar_normalization_divides_by_the_running_root_mean_square() -> None:
    """v̂ₜ = (1-β)·Σ βᵗ⁻ˢ cₛ² / (1-βᵗ), written out as a sum for every step."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(40, 3, generator=generator, dtype=torch.float64) * 100
    normalize = ScalarNormalization()
    for t in range(1, 41):
        weights = torch.tensor([0.99 ** (t - s) for s in range(1, t + 1)], dtype=torch.float64)
        mean_square = (weights * history[:t].square().mean(1)).sum() / weights.sum()
        expected = history[t - 1] / mean_square.sqrt()
        assert normalize(history[t - 1].tolist()) == pytest.approx(expected.tolist(), rel=1e-9)


def test_normalized_zero_is_zero() -> None:
    assert ScalarNormalization()([0.0, 0.0]) == [0.0, 0.0]


@EVERY_SUBSPACE
def test_normalized_steps_do_not_depend_on_the_scale_of_the_loss(subspace: str) -> None:
    """A loss in other units gives the same run; without normalization it would not."""
    weights = []
    for scale in (1.0, 1024.0):
        model, loss = mixed_task(subspace)
        zo, optimizer = engine(model, subspace, 1e-3, normalize=True, num_directions=2, max_projected_grad=0.0)
        for _ in range(10):
            zo.estimate(lambda loss=loss, scale=scale: loss() * scale)
            optimizer.step()
        zo.finish()
        weights.append(weights_of(model))
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=1e-6), name
    start = weights_of(mixed_task(subspace)[0])
    assert any((weights[0][name] - start[name]).abs().max() > 1e-3 for name in start)


# Losses that are not numbers.


BAD = [
    (bad, where) for bad in (math.nan, math.inf, -math.inf) for where in (0, 3)
]  # at the first probe, or at the last


@pytest.mark.parametrize(
    ("subspace", "optimizer", "bad", "where"),
    [
        *(("low_rank", "adamw", *case) for case in BAD),
        *(
            (name, optimizer, *BAD[i % 6])
            for i, (name, optimizer) in enumerate(itertools.product(SUBSPACES, OPTIMIZERS))
        ),
    ],
)
def test_a_non_finite_loss_moves_nothing(subspace: str, optimizer: str, bad: float, where: int) -> None:
    """Neither weights nor the optimizer's and the normalization's state, momentum and weight decay included.

    The step is counted, and the next one goes on with directions of its own.
    """
    model, loss = mixed_task(subspace)
    zo, stepper = engine(
        model, subspace, 1e-2, optimizer, weight_decay=0.1, num_directions=2, normalize=True, batched_probes=False
    )
    for _ in range(3):
        zo.estimate(loss)
        stepper.step()
    before, coordinates = weights_of(model), {n: c.detach().clone() for n, c in zo.subspace.coordinates.items()}
    state, engine_state = _copied(stepper.state_dict()["state"]), zo.state_dict()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss() if calls != where + 1 else torch.tensor(bad)

    estimate = zo.estimate(closure)
    stepper.step()
    assert not estimate.is_finite
    assert zo.skipped_steps == 1 and zo.step == 4
    assert_same_bits(weights_of(model), before)
    assert_same_bits({n: c.detach().clone() for n, c in zo.subspace.coordinates.items()}, coordinates)
    assert _same(stepper.state_dict()["state"], state)
    for key in ("pending_decay", "normalization"):
        assert zo.state_dict()[key] == engine_state[key]
    assert zo.estimate(loss).is_finite
    stepper.step()
    assert not _same(weights_of(model) | dict(zo.subspace.coordinates), before | coordinates)


@pytest.mark.parametrize("loss", [1e308, 1e37])
@EVERY_SUBSPACE
def test_a_difference_that_overflows_is_skipped(subspace: str, loss: float) -> None:
    """Finite losses whose c is not, in float64 or in float32."""
    model, _ = mixed_task(subspace)
    zo, _ = engine(model, subspace, 1e-2, batched_probes=False)
    values = iter([loss, -loss])
    assert not zo.estimate(lambda: torch.tensor(next(values), dtype=torch.float64)).is_finite
    assert zo.skipped_steps == 1


# Arguments.


def test_unknown_names_say_what_there_is() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(
        ValueError, match=r"subspace='nothing' is unknown; choose one of auto, low_rank, full, adapter"
    ):
        ZerothOrder(model, "nothing")
    with pytest.raises(ValueError, match=r"direction='cauchy' is unknown; choose one of gaussian, rademacher"):
        ZerothOrder(model, direction="cauchy")
    assert "forward" not in vars(model)


@EVERY_SUBSPACE
def test_eps_defaults_to_the_subspaces_own(subspace: str) -> None:
    for given in (None, 0.5):
        zo = ZerothOrder(with_scales(subspace, nn.Sequential(nn.Linear(8, 8))), subspace, eps=given)
        assert zo.estimator.eps == (given or zo.subspace.default_eps)


@EVERY_SUBSPACE
def test_training_mode_is_left_alone(subspace: str) -> None:
    """The engine does not decide about dropout: that is the caller's."""
    model, loss = mixed_task(subspace)
    for training in (True, False):
        model.train(training)
        zo, optimizer = engine(model, subspace, 1e-2)
        zo.estimate(loss)
        optimizer.step()
        zo.finish()
        assert all(module.training is training for module in model.modules())


def _copied(state: dict) -> dict:
    return {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()} for key, entry in state.items()
    }


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b
