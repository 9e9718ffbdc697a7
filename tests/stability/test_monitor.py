"""The monitor on quadratics, where what it should find is known."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, weights_of
from tests.stability.bowls import Bowl, Net, engine
from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.curvature_probes import REMEMBERED
from zo_hf.rng import Stream, draw_slice
from zo_hf.stability import critical_step_size, step_size_bounds
from zo_hf.stability.descent import Descent
from zo_hf.stability.monitor import SAFETY, StabilityMonitor, stability

DECAYING = [1 / i for i in range(1, 51)]


def run(zo: ZerothOrder, optimizer: torch.optim.Optimizer, closure: Any, steps: int) -> list[Any]:
    """The estimates of so many steps."""
    estimates = []
    for _ in range(steps):
        estimates.append(zo.estimate(closure))
        optimizer.step()
    return estimates


def watched(zo: ZerothOrder, lr: float = 1e-9, every: int = 1, action: str = "warn", **options: Any) -> tuple:
    """An SGD that the engine knows, and the monitor of both."""
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=lr, **options))
    return optimizer, StabilityMonitor(zo, optimizer, every, action)


@pytest.mark.parametrize("estimator, extra", [("two_point", 1), ("one_sided", 1), ("second_difference", 0)])
@pytest.mark.parametrize("batched", [False, True])
def test_the_curvature_is_along_the_directions_of_the_step(estimator: str, extra: int, batched: bool) -> None:
    model = Bowl(DECAYING)
    zo = engine(model, estimator=estimator, num_directions=3, eps=1e-2)
    optimizer, _ = watched(zo, every=2)
    own = zo.forward_passes_per_step
    for step in range(4):
        assert zo.curvature_passes == (0 if step % 2 else extra)
        before = zo.forward_passes
        estimate = zo.estimate(model.loss)
        assert zo.forward_passes - before == own + (0 if step % 2 else extra)
        z = torch.stack([draw_slice(Stream(5, step, i), "w", 0, 50, GAUSSIAN) for i in range(3)]).double()
        expected = [] if step % 2 else ((z * model.eigenvalues) * z).sum(1)[: 1 if estimator == "one_sided" else 3]
        assert estimate.curvatures == pytest.approx([float(k) for k in expected], rel=1e-6)
        optimizer.step()


@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "second_difference"])
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_nothing_else_changes(estimator: str, subspace: str) -> None:
    """Not a bit of the numbers or of the weights, with micro-batches, and in bfloat16."""
    results = []
    for every in (0, 2):
        model = Net(torch.bfloat16)
        zo = ZerothOrder(model, subspace, estimator=estimator, num_directions=2, seed=3, batched_probes=False)
        kind = torch.optim.SGD
        if subspace == "full":
            from zo_hf.rules import SeededSGD

            optimizer = zo.prepare(SeededSGD(zo.coordinates(), zo.subspace, lr=1e-2))
        else:
            optimizer = zo.prepare(kind(zo.coordinates(), lr=1e-2, momentum=0.9))
        if every:
            StabilityMonitor(zo, optimizer, every)
        numbers = []
        for _ in range(5):
            zo.probe(model, 0.5)
            zo.probe(model, 0.5)
            estimate = zo.finish_estimate()
            numbers.append((estimate.loss, estimate.projected_gradients))
            optimizer.step()
        zo.finish()
        results.append((numbers, weights_of(model)))
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


def test_micro_batches_are_one_loss() -> None:
    found = []
    for parts in ((1.0,), (0.25, 0.75)):
        model = Bowl(DECAYING)
        zo = engine(model)
        _optimizer, monitor = watched(zo)
        for weight in parts:
            zo.probe(model.loss, weight)
        found.append(zo.finish_estimate().curvatures)
        assert zo.forward_passes == 3 * len(parts)
        zo.discard()
        assert len(monitor.probes.curvatures) == 1
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_discarded_step_leaves_nothing() -> None:
    model = Bowl()
    zo = engine(model)
    _optimizer, monitor = watched(zo)
    zo.probe(model.loss)
    zo.discard()
    z = draw_slice(Stream(5, 0), "w", 0, 64, GAUSSIAN).double()
    assert zo.estimate(model.loss).curvatures == pytest.approx([float(z.square().sum())], rel=1e-6)
    assert len(monitor.probes.curvatures) == 1


@pytest.mark.parametrize("direction", ["gaussian", "sphere", "rademacher"])
def test_what_it_finds_brackets_the_truth(direction: str) -> None:
    model = Bowl(DECAYING)
    trace, largest = float(model.eigenvalues.sum()), 1.0
    norm = float(model.eigenvalues.square().sum()) ** 0.5
    zo = engine(model, direction=direction, num_directions=2, eps=1e-2)
    optimizer, monitor = watched(zo)
    run(zo, optimizer, model.loss, 60)
    found = monitor.found
    assert len(monitor.probes.curvatures) == REMEMBERED == found.trace.count
    low, high = found.trace.interval(0.999)
    assert low < trace < high or (direction == "rademacher" and trace == pytest.approx(found.trace.value, rel=1e-6))
    assert found.lambda_max == pytest.approx(trace if direction == "rademacher" else norm, rel=0.4)
    assert found.lambda_max > largest
    critical = critical_step_size(model.eigenvalues, num_directions=2, direction=direction)
    assert found.critical_lower < critical < found.critical_upper * (1.0 + 3 * found.trace.standard_error / trace)
    assert found.ratio == 1e-9 / found.critical_upper
    assert monitor.logs() == {
        "zo/hessian_trace": found.trace.value,
        "zo/hessian_trace_error": found.trace.standard_error,
        "zo/lambda_max": found.lambda_max,
        "zo/critical_lr_lower": found.critical_lower,
        "zo/critical_lr_upper": found.critical_upper,
        "zo/stability_ratio": found.ratio,
    }


@pytest.mark.parametrize("direction", ["gaussian", "sphere"])
@pytest.mark.parametrize("directions", [1, 4])
def test_the_spread_is_the_frobenius_norm(direction: str, directions: int) -> None:
    values = torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    z = torch.randn(20000, directions, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if direction == "sphere":
        z = z / z.norm(dim=-1, keepdim=True) * 2
    samples = (z.square() * values).sum(-1).mean(-1).tolist()
    found = stability(samples, 1.0, measured_directions=directions, direction=direction, dimension=4)
    assert found.lambda_max == pytest.approx(float(values.norm()), rel=0.03)


SPECTRA = ([1.0], [4.0, 1.0], [10.0, 1.0, 0.1], [1.0] * 10, [1 / i for i in range(1, 101)], [1.0, *[0.01] * 1000])


@pytest.mark.parametrize("spectrum", SPECTRA, ids=len)
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"num_directions": 4},
        {"momentum": 0.9},
        {"momentum": 0.9, "ema": True},
        {"momentum": 0.5, "num_directions": 16},
    ],
    ids=str,
)
def test_the_upper_bound_is_one_and_closer_than_the_trace_alone(spectrum: list[float], method: dict) -> None:
    values = torch.tensor(spectrum, dtype=torch.float64)
    trace, square = float(values.sum()), float(values.square().sum())
    critical = critical_step_size(spectrum, **method)
    upper = step_size_bounds(trace, square / trace, **method)[0]
    assert critical <= upper * (1 + 1e-12) <= step_size_bounds(trace, 0.0, **method)[1] * (1 + 1e-12)
    assert step_size_bounds(trace, square**0.5, **method)[0] <= critical * (1 + 1e-12)
    if len(set(spectrum)) == 1:
        assert upper == pytest.approx(critical, rel=1e-9)


def test_momentum_dampening_and_normalization_enter() -> None:
    model = Bowl(1.0, 50)
    zo = engine(model, normalize=True)
    optimizer, monitor = watched(zo, momentum=0.9, dampening=0.5)
    run(zo, optimizer, model.loss, 20)
    samples, root = monitor.probes.curvatures, zo.normalization.root
    plain = stability(samples, 1e-9, Descent(0.9))
    assert plain.critical_upper == pytest.approx(step_size_bounds(plain.trace.value, 1.0, momentum=0.9)[0], rel=0.05)
    assert monitor.found.critical_upper == pytest.approx(plain.critical_upper * root / 0.5, rel=1e-9)
    assert monitor.found.critical_lower == pytest.approx(plain.critical_lower * root / 0.5, rel=1e-9)


@pytest.mark.parametrize("estimator, extra", [("two_point", 3), ("one_sided", 2), ("second_difference", 2)])
def test_adam_is_measured_along_what_it_divides_by(estimator: str, extra: int) -> None:
    model = Bowl(DECAYING)
    zo = engine(model, estimator=estimator)
    optimizer = zo.prepare(torch.optim.AdamW(zo.coordinates(), lr=1e-4, betas=(0.8, 0.9)))
    monitor = StabilityMonitor(zo, optimizer, 3)
    expected = []
    for step in range(7):
        before, own = zo.forward_passes, zo.forward_passes_per_step
        measured = step % 3 == 0 and step > 0
        assert zo.curvature_passes == (extra if measured else 0)
        zo.estimate(model.loss)
        assert zo.forward_passes - before == own + (extra if measured else 0)
        if measured:
            (state,) = optimizer.state.values()
            divisor = (state["exp_avg_sq"] / (1 - 0.9**step)).sqrt() + 1e-8
            z = draw_slice(Stream(5, step), "w", 0, 50, GAUSSIAN).double()
            expected.append(float((z.square() * model.eigenvalues / divisor).sum()) / (1 - 0.8 ** (step + 1)))
        optimizer.step()
    assert monitor.probes.curvatures == pytest.approx(expected, rel=1e-5)
    assert all(block.scale is None for block in zo.subspace.coordinate_blocks)
    critical = step_size_bounds(monitor.found.trace.value, 0.0, momentum=0.8, ema=True)[0]
    assert monitor.found.critical_upper == pytest.approx(critical)


def test_the_ratio_predicts_divergence() -> None:
    """Of 100 seeds at least 95: what is measured at the start says which learning rate stays and which blows up."""
    critical, dimension = [], 128
    for seed in range(100):
        model = Bowl(1.0, dimension)
        zo = engine(model, seed=seed)
        optimizer, monitor = watched(zo)
        run(zo, optimizer, model.loss, 16)
        assert monitor.found.ratio == 1e-9 / monitor.found.critical_upper
        critical.append(monitor.found.critical_upper)
    generator = torch.Generator().manual_seed(1)
    for ratio, blows_up in ((0.9, False), (1.1, True)):
        rate = torch.tensor(critical)[:, None] * ratio
        x = torch.ones(100, dimension)
        for _ in range(3000):  # the same steps, of all seeds at once: on a quadratic c is z·x, whatever the distance
            z = torch.randn(100, dimension, generator=generator)
            x -= rate * (z * x).sum(1, keepdim=True) * z
            x.clamp_(-1e6, 1e6)
        grown = x.square().mean(1)
        assert int((grown > 10 if blows_up else grown < 0.1).sum()) >= 95


def test_the_ratio_predicts_divergence_in_the_engine_too() -> None:
    for ratio, blows_up in ((0.7, False), (1.3, True)):
        model = Bowl(1.0, 50)
        zo = engine(model)
        rate = ratio * critical_step_size([1.0] * 50)
        optimizer, monitor = watched(zo, rate, every=10)
        run(zo, optimizer, model.loss, 400)
        zo.finish()
        loss = model.loss().item()
        assert loss > 250 if blows_up else loss < 2.5
        assert monitor.found.ratio == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_cap_saves_a_run_that_diverges_without_it(momentum: float) -> None:
    rate = 1.5 * critical_step_size([1.0] * 50, momentum=momentum)
    losses = {}
    for action in ("warn", "cap"):
        model = Bowl(1.0, 50)
        zo = engine(model)
        optimizer, monitor = watched(zo, rate, 10, action, momentum=momentum)
        taken: list[float] = []
        zo.on_step = lambda step, taken=taken: taken.append(step.learning_rates[0])
        run(zo, optimizer, model.loss, 400)
        zo.finish()
        losses[action] = model.loss().item()
        assert optimizer.param_groups[0]["lr"] == rate, "a schedule finds what it has left"
        if action == "warn":
            assert set(taken) == {rate} and monitor.found.crossed and "learning_rate" not in monitor.logs()
        else:
            assert taken[-1] == SAFETY * monitor.found.critical_lower == monitor.logs()["learning_rate"] < rate
            assert monitor.found.ratio == taken[-1] / monitor.found.critical_upper < 1
    assert losses["warn"] > 1e4 and losses["cap"] < 1.0


def test_cap_leaves_a_lower_schedule_alone() -> None:
    model = Bowl(1.0, 50)
    zo = engine(model)
    optimizer, monitor = watched(zo, 1.0, 1, "cap")
    taken: list[float] = []
    zo.on_step = lambda step: taken.append(step.learning_rates[0])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(10):
        zo.estimate(model.loss)
        optimizer.step()
        scheduler.step()
    assert taken[0] < 0.1 and taken[7:] == [0.5**7, 0.5**8, 0.5**9]
    assert optimizer.param_groups[0]["lr"] == 0.5**10
    assert "learning_rate" not in monitor.logs()


def test_it_warns_once_for_every_crossing(caplog: pytest.LogCaptureFixture) -> None:
    model = Bowl(1.0, 50)
    zo = engine(model)
    critical = critical_step_size([1.0] * 50)
    optimizer, monitor = watched(zo, 0.5 * critical)
    with caplog.at_level(logging.WARNING, "zo_hf.stability.monitor"):
        for factor, warnings in ((0.5, 0), (1.5, 1), (1.6, 1), (0.5, 1), (1.5, 2)):
            optimizer.param_groups[0]["lr"] = factor * critical
            run(zo, optimizer, model.loss, 10)
            said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
            assert len(said) == warnings
    assert "step 10: learning_rate=" in said[0] and "zo_stability_action='cap'" in said[0]
    assert f"lower it to at most {SAFETY * monitor.found.critical_lower:.1g}"[:-1] in said[0]


def test_a_single_sample_must_be_clear() -> None:
    assert not stability([50.0], 0.06).crossed and stability([50.0], 0.06).ratio > 1
    assert stability([50.0], 0.1).crossed
    assert not stability([-50.0, -50.0], 1e9).crossed and stability([-1.0], 1.0).critical_upper == float("inf")


def test_it_says_when_rounding_dominates(caplog: pytest.LogCaptureFixture) -> None:
    model = Bowl(1.0, 50)
    cases = {(0.0, torch.float32): False, (1e4, torch.float32): True, (1e4, torch.float64): False}
    for (offset, dtype), dominates in (cases | {(0.0, torch.bfloat16): True}).items():
        zo = engine(model, eps=3e-3)
        optimizer, _ = watched(zo)
        caplog.clear()
        run(zo, optimizer, lambda offset=offset, dtype=dtype: (model.loss() + offset).to(dtype), 8)
        assert ("mostly the rounding" in caplog.text) == dominates


def test_losses_that_are_not_finite_are_left_out() -> None:
    model = Bowl(1.0, 50)
    zo = engine(model)
    optimizer, monitor = watched(zo)
    run(zo, optimizer, lambda: model.loss() * float("nan"), 1)
    assert monitor.probes.curvatures == [] and monitor.found is None and monitor.logs() == {}
    run(zo, optimizer, model.loss, 1)
    assert len(monitor.probes.curvatures) == 1


def test_the_state_of_an_engine_holds_what_was_found() -> None:
    import json

    model = Bowl(1.0, 50)
    zo = engine(model)
    optimizer, monitor = watched(zo, 0.06, 2, "cap")
    run(zo, optimizer, model.loss, 7)
    state = json.loads(json.dumps(zo.state_dict()))
    other = engine(Bowl(1.0, 50))
    _optimizer, again = watched(other, 0.06, 2, "cap")
    other.load_state_dict(state)
    assert again.probes.curvatures == monitor.probes.curvatures and len(again.probes.curvatures) == 4
    assert again.probes.crossed == monitor.probes.crossed is True
    engine(Bowl(1.0, 50)).load_state_dict(state)  # not watched
    del state["curvature"]
    other.load_state_dict(state)  # by an earlier version


REFUSED = {
    "estimator='fzoo'": ({"estimator": "fzoo", "num_directions": 2}, "zo_estimator='fzoo'"),
    "evolution": ({"estimator": "evolution", "num_directions": 2}, "zo_estimator='evolution'"),
    "coordinate": ({"estimator": "coordinate"}, "zo_estimator='coordinate'"),
    "sign": ({"rule": "sign"}, "zo_rule='sign'"),
    "orthogonal": ({"direction": "orthogonal"}, "zo_direction='orthogonal'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_theory_does_not_know_is_refused(name: str) -> None:
    options, said = REFUSED[name]
    zo = engine(Bowl(), **options)
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.1))
    with pytest.raises(
        ValueError, match=rf"^zo_stability_steps=10 does not combine with {said}: the theory .*; use [^.]*\.$"
    ):
        StabilityMonitor(zo, optimizer)
    assert zo.curvature is None


def test_optimizers_that_the_theory_does_not_know_are_refused() -> None:
    zo = engine(Bowl())
    groups = zo.coordinates()
    for optimizer in (
        torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.SGD(groups, lr=0.1, maximize=True),
        torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
        torch.optim.RMSprop(groups, lr=0.1),
    ):
        with pytest.raises(ValueError, match=rf"^zo_stability_steps knows .* this {type(optimizer).__name__}; use"):
            StabilityMonitor(zo, zo.prepare(optimizer))
    with pytest.raises(ValueError, match=r"zo\.prepare first"):
        StabilityMonitor(zo, torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ValueError, match=r"^zo_stability_steps=0 must be a whole number of at least 1"):
        StabilityMonitor(zo, optimizer, 0)
    with pytest.raises(ValueError, match=r"^zo_stability_action='stop' must be one of warn, cap"):
        StabilityMonitor(zo, optimizer, 1, "stop")


def test_curvature_rule_is_measured_as_it_scales_and_not_with_adam() -> None:
    options = {"rule": "curvature", "estimator": "second_difference"}
    model = Bowl(1.0, 50)
    zo = engine(model, **options)
    watched(zo)
    (block,) = zo.subspace.coordinate_blocks
    block.scale = torch.full((block.layout.size,), 0.5, dtype=torch.float64)
    estimate = zo.estimate(model.loss)
    z = draw_slice(Stream(5, 0), "w", 0, 50, GAUSSIAN).double()
    assert estimate.curvatures == pytest.approx([0.25 * float(z.square().sum())], rel=1e-5)
    zo = engine(Bowl(), **options)
    with pytest.raises(ValueError, match=r"zo_rule='curvature' with AdamW"):
        StabilityMonitor(zo, zo.prepare(torch.optim.AdamW(zo.coordinates())))
