"""The methods that docs/add_a_method.md adds are what the text says, and the shared checks find them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.methods.checks import CHECKS, its_numbers_replay
from tests.methods.table import combinations
from zo_hf.cli.method_tables import kinds
from zo_hf.cli.methods import as_text
from zo_hf.estimators import ESTIMATORS, TwoPoint
from zo_hf.rules import RULES
from zo_hf.trajectory import read_trajectory, replay

TEXT = (Path(__file__).parents[2] / "docs" / "add_a_method.md").read_text(encoding="utf-8")
ESTIMATOR, RULE, RUN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ADDED = [("estimator", "four_point"), ("rule", "steepest")]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the text defines; its methods are registered until the test ends."""
    defined: dict[str, Any] = {"__name__": "add_a_method"}
    exec(ESTIMATOR, defined)
    exec(RULE, defined)
    monkeypatch.setitem(ESTIMATORS, "four_point", defined["FourPoint"])
    monkeypatch.setitem(RULES, "steepest", defined["Steepest"])
    return defined


def test_the_run_of_the_text_trains_with_them(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = seeded(tiny_opt)
    names |= {"model": model, "train_dataset": TinyTask()}
    exec(
        RUN.replace("max_steps=4", "max_steps=4, use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True"),
        names,
    )
    log = read_trajectory(tmp_path / "out")
    assert log.header["settings"]["zo_estimator"] == "four_point" and log.header["settings"]["zo_rule"] == "steepest"
    assert len(log.records) == 4
    before = weights_of(seeded(tiny_opt))
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights_of(model).items())
    assert_same_bits(weights_of(replay(seeded(tiny_opt), tmp_path / "out")), weights_of(model))


@pytest.mark.parametrize("entry", ADDED, ids="-".join)
def test_the_shared_checks_pick_them_up(names: dict[str, Any], entry: tuple[str, str]) -> None:
    found = combinations(entry)
    partners = {other for combination in found for other in combination.entries}
    assert len(found) >= 6 and entry in partners and ("subspace", "full") in partners
    factors, weights = (next(c for c in found if c.subspace == subspace) for subspace in ("low_rank", "full"))
    for check in CHECKS.values():
        check(factors)
    its_numbers_replay(weights)


def test_they_are_listed(names: dict[str, Any]) -> None:
    shown = as_text(kinds())
    assert "four_point" in shown and "Richardson 1911" in shown and "steepest" in shown


def test_four_points_are_exact_on_a_cubic_and_two_are_not(names: dict[str, Any]) -> None:
    def error(estimator: Any) -> float:
        losses = [(1.0 + probe.scale) ** 3 for probe in estimator.probes()]
        return abs(estimator.projected_gradients(losses)[0] - 3.0)

    assert error(names["FourPoint"](0.5)) < 1e-12 < 0.2 < error(TwoPoint(0.5))


def test_the_steepest_direction_alone_moves(names: dict[str, Any]) -> None:
    written: list[list[float]] = []

    class Noting:
        name = "low_rank"

        def write_gradient(self, coefficients: list[float], *_: Any) -> None:
            written.append(coefficients)

    names["Steepest"](Noting(), TwoPoint(1e-3, 3)).write_gradient([1.0, -6.0, 3.0], None, None)
    assert written == [[0.0, -2.0, 0.0]]
