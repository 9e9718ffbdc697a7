"""The coherence of remembered and new differences, against quadratics on which the old gradient is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from tests.conftest import weights_of
from tests.rules.cocd.helpers import N, Quadratic, cocd, regression, run
from tests.rules.cocd.test_resuming import COMMON, SETUPS, model_for
from tests.trainer.runs import SaveAt, logged, trained
from zo_hf.engine import ZerothOrder
from zo_hf.rules.cocd import CoherentCoordinateDescent
from zo_hf.rules.coherence import Coherence

BOTH = {"zo/coherence", "zo/mean_coherence"}


def quadratic() -> Quadratic:
    """Eight curvatures from 1 to 4 along no coordinate."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    hessian = basis @ torch.diag(torch.linspace(1.0, 4.0, 8, dtype=torch.float64)) @ basis.T
    return Quadratic(hessian, torch.randn(8, generator=generator, dtype=torch.float64))


def steps_of(model: torch.nn.Module, loss, steps: int, per_step: int, lr: float, **options) -> list[dict[str, float]]:
    """What the rule logs after each step."""
    zo, _ = run(model, loss, 0, per_step, lr, **options)
    found = []
    for _ in range(steps):
        zo.estimate(loss)
        zo.optimizer.step()
        found.append(zo.rule.logs())
    return found


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


@pytest.mark.parametrize(("per_step", "decay"), [(2, 0.9), (2, 1.0), (3, 0.9), (3, 0.5), (8, 0.9), (8, 0.0)])
def test_on_a_quadratic_it_is_the_cosine_of_gradients_a_cycle_apart(per_step: int, decay: float) -> None:
    lr, steps, cycle = 0.08, 3 * -(-8 // per_step) + 2, -(-8 // per_step)
    model = quadratic()
    points = [parameters_to_vector(model.parameters()).detach().clone()]
    points += cocd(model, model, steps, per_step, decay, lr, 0.01)
    gradients = [model.hessian @ point for point in points]
    model = quadratic()
    found = steps_of(model, model, steps, per_step, lr, cocd_decay=decay)
    expected: list[float] = []
    for step in range(steps):
        turns = [turn for turn in range(step * per_step, (step + 1) * per_step) if turn >= 8]
        if turns:
            old = torch.stack([gradients[(turn - 8) // per_step][turn % 8] for turn in turns])
            expected.append(cosine(old, torch.stack([gradients[step][turn % 8] for turn in turns])))
            assert found[step]["zo/coherence"] == pytest.approx(expected[-1], abs=1e-6)
            last_cycle = expected[-cycle:]
            assert found[step]["zo/mean_coherence"] == pytest.approx(sum(last_cycle) / len(last_cycle), abs=1e-6)
        else:
            assert found[step] == {}
    assert min(expected) < 0.999, "the point moves, so old entries are stale"


@pytest.mark.parametrize("decay", [0.3, 1.0])
@pytest.mark.parametrize("estimator", ["coordinate", "coordinate_forward"])
def test_it_is_one_where_nothing_moves(decay: float, estimator: str) -> None:
    assert N % 3, "blocks of neighboring cycles overlap"
    found = steps_of(*regression(), 20, 3, 0.0, cocd_decay=decay, estimator=estimator)
    assert found[:5] == [{}] * 5, "turns 0 to 14 of 17 coordinates are in the first cycle"
    for logs in found[5:]:
        assert logs == {key: pytest.approx(1.0, abs=1e-9) for key in BOTH}


@pytest.mark.parametrize(("factor", "sign"), [(0.5, 1.0), (1.5, -1.0)])
def test_entries_point_the_wrong_way_where_a_cycle_goes_beyond_the_minimum(factor: float, sign: float) -> None:
    """With a diagonal Hessian a cycle multiplies every coordinate by 1 - α·λ·Σγᵏ."""
    model = Quadratic(3.0 * torch.eye(8, dtype=torch.float64), torch.arange(1.0, 9.0, dtype=torch.float64))
    rate = factor / (3.0 * sum(0.9**k for k in range(4)))
    found = steps_of(model, model, 12, 2, rate, cocd_decay=0.9)
    assert [logs["zo/coherence"] for logs in found[4:]] == [pytest.approx(sign)] * 8


def test_it_changes_no_bit_and_costs_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = run(*regression(torch.float32), 20, 3, 0.05)
    for name in ("before", "after"):
        monkeypatch.setattr(Coherence, name, lambda *_: None)
    without = run(*regression(torch.float32), 20, 3, 0.05)
    assert with_it[0].rule.logs().keys() == BOTH and without[0].rule.logs() == {}
    assert all(torch.equal(a, b) for a, b in zip(with_it[1], without[1], strict=True))
    assert with_it[0].forward_passes == without[0].forward_passes == 20 * 6


@pytest.mark.parametrize("options", [{"cocd_memory": 9}, {"cocd_decay": 0.0}, {"rule": "none"}])
def test_what_keeps_no_old_entries_has_none(options: dict) -> None:
    assert steps_of(*regression(), 20, 3, 0.02, **options) == [{}] * 20


def test_coordinates_of_a_skipped_step_have_no_old_entry_in_the_next_cycle() -> None:
    model, loss = regression()
    zo, _ = run(model, loss, 0, 4, 0.0, cocd_decay=0.9)
    found = []
    for step in range(12):
        zo.estimate(loss if step != 2 else lambda: loss() * torch.nan)
        zo.optimizer.step()
        found.append(zo.rule.logs().get("zo/coherence"))
    # 17 coordinates: step 2 misses turns 8 to 11, which come again as turns 25 to 28, in steps 6 and 7.
    assert found[:4] == [None] * 4
    assert found[4:] == [pytest.approx(1.0)] * 8, "and what is compared does not count the missing ones"


def test_a_step_that_is_estimated_again_is_compared_with_the_last_cycle() -> None:
    logs = []
    for again in (False, True):
        model, loss = regression()
        zo, _ = run(model, loss, 8, 3, 0.05)
        if again:
            zo.estimate(lambda model=model: model(torch.ones(1, 3).double()).square().sum())
        zo.estimate(loss)
        logs.append(zo.rule.logs())
    assert logs[0] == logs[1] and logs[0].keys() == BOTH


def test_new_bases_forget_it() -> None:
    zo, _ = run(*regression(), 9, 3, 0.05)
    assert zo.rule.logs().keys() == BOTH
    zo.rule.after_fold()
    assert zo.rule.logs() == {}


def test_a_resumed_run_logs_the_same() -> None:
    model, loss = regression(torch.float32)
    zo, _ = run(model, loss, 9, 3, 0.05)
    state, weights, numbers = zo.rule.state(), weights_of(model), zo.state_dict()
    other, other_loss = regression(torch.float32)
    other.load_state_dict(weights)
    resumed = ZerothOrder(other, "full", estimator="coordinate", rule="cocd", eps=1e-2, num_directions=3)
    resumed.prepare(torch.optim.SGD(resumed.coordinates(), lr=0.05))
    resumed.load_state_dict(numbers)
    resumed.rule.load_state(state)
    assert resumed.rule.logs() == zo.rule.logs()
    for _ in range(7):
        for engine, closure in ((zo, loss), (resumed, other_loss)):
            engine.estimate(closure)
            engine.optimizer.step()
        assert resumed.rule.logs() == zo.rule.logs() != {}
    with pytest.raises(ValueError, match="2 steps' coherences, and a cycle has 6 steps"):
        zo.rule.load_state(state | {"coherence": torch.zeros(2)})


def test_a_rule_that_has_gone_on_loads_the_state_of_an_earlier_version() -> None:
    model, loss = regression(torch.float32)
    zo, _ = run(model, loss, 9, 3, 0.0)
    numbers, state = zo.state_dict(), zo.rule.state()
    del state["coherence"]
    for _ in range(20):
        zo.estimate(loss)
    zo.load_state_dict(numbers)
    zo.rule.load_state(state)
    assert zo.rule.logs() == {}
    zo.estimate(loss)
    assert zo.rule.logs() == {key: pytest.approx(1.0) for key in BOTH}


def test_the_trainer_logs_it_and_a_checkpoint_without_it_still_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = COMMON | SETUPS["adapter"] | {"zo_num_directions": 20, "max_steps": 9}
    with monkeypatch.context() as earlier:
        complete = CoherentCoordinateDescent.state
        names = ("differences", "next_step")
        earlier.setattr(CoherentCoordinateDescent, "state", lambda rule: {k: complete(rule)[k] for k in names})
        whole = trained(tmp_path / "a", model_for("adapter"), more={"callbacks": [SaveAt(4)]}, **options)
    means = logged(whole, "zo/mean_coherence")
    assert 0 < len(means) < 9 and all(-1 <= value <= 1 for value in means), "and none in the first cycle"
    resumed = trained(tmp_path / "b", model_for("adapter"), resume=str(tmp_path / "a/checkpoint-4"), **options)
    assert logged(resumed, "zo/coherence")[-5:] == logged(whole, "zo/coherence")[-5:]
    assert logged(resumed, "loss")[-5:] == logged(whole, "loss")[-5:]


@settings(max_examples=60, deadline=None)
@given(
    dimension=st.integers(1, 30),
    per_step=st.integers(1, 30),
    decay=st.floats(0.5, 1.0),
    scale=st.floats(1e-12, 1e12),
    seed=st.integers(0, 10**6),
)
def test_it_is_a_cosine_whatever_the_scale(
    dimension: int, per_step: int, decay: float, scale: float, seed: int
) -> None:
    per_step = min(per_step, dimension)
    old, new = torch.randn(2, per_step, generator=torch.Generator().manual_seed(seed))
    found = []
    for factor in (1.0, scale):
        coherence = Coherence(dimension, per_step, decay, old)
        step = 2 * -(-dimension // per_step)  # every coordinate has an old entry
        coherence.before(step, factor * old)
        coherence.after(step, new)
        found.append(coherence.logs()["zo/coherence"])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert -1 - 1e-6 <= found[0] <= 1 + 1e-6 and not math.isnan(found[0])
