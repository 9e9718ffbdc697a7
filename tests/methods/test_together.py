"""What entries of different registries do to one another, where each of them is right alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_llama, weights_of
from tests.rules.helpers import engine, estimator_for, gradients, linear_task, steps
from tests.trainer.runs import config, make_trainer, trained
from zo_hf import checkpoint
from zo_hf.directions import GivenMask
from zo_hf.engine import ZerothOrder
from zo_hf.rules import RULES
from zo_hf.subspaces import LowRank
from zo_hf.tasks.job_arguments import parse_arguments
from zo_hf.trajectory import replay


@pytest.mark.parametrize("estimator", ["coordinate", "coordinate_forward"])
def test_the_conservative_rule_looks_along_its_gradient_also_where_directions_are_coordinates(estimator: str) -> None:
    model, loss = linear_task()
    zo, optimizer = engine(model, "conservative", 0.3, estimator=estimator, num_directions=8, fold_steps=0)
    last = loss().item()
    for _ in range(30):
        zo.estimate(loss)
        optimizer.step()
        now = loss().item()
        assert now <= last + 1e-6
        last = now
    assert last < 0.5 * float(linear_task()[1]())


def masked(rule: str, **options: Any) -> tuple[ZerothOrder, torch.optim.Optimizer, Callable[[], torch.Tensor]]:
    """An engine whose directions leave out the first row of the matrix's factor."""
    model, loss = linear_task()
    space = LowRank(model, 2, 0)
    masks = {name: torch.ones_like(coordinate, dtype=torch.bool) for name, coordinate in space.coordinates.items()}
    masks["weight"][0] = False
    direction = GivenMask(space.direction_context(4), masks)
    settings = {"estimator": estimator_for(rule), "num_directions": 4, **options}
    zo = ZerothOrder(model, space, rule=rule, direction=direction, **settings)
    return zo, zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2)), loss


@pytest.mark.parametrize("rule", [name for name, kind in RULES.items() if kind.fills_tensors])
def test_a_rule_that_fills_matrices_is_refused_beside_a_mask(rule: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"zo_rule='{rule}' does not combine.*the rule moves whole matrices.*use zo_direction='gaussian'",
    ):
        masked(rule)


def test_curvature_stays_where_no_direction_went() -> None:
    zo, optimizer, loss = masked("curvature", curvature_rate=0.1)
    steps(zo, optimizer, loss, 50)
    h = zo.rule.state()["weight"]
    assert torch.equal(h[0], torch.ones_like(h[0])) and not torch.equal(h[1], torch.ones_like(h[1]))


def test_estimating_a_step_of_coordinate_descent_again_replaces_what_was_found() -> None:
    found = []
    for times in (1, 2):
        model, loss = linear_task()
        zo, optimizer = engine(model, "cocd", subspace="full", num_directions=4)
        steps(zo, optimizer, loss, 3)
        for _ in range(times):
            zo.estimate(loss)
        found.append(gradients(zo))
    assert_same_bits(found[0], found[1])


def test_coordinate_descent_takes_plain_descent_alone() -> None:
    zo = ZerothOrder(linear_task()[0], "full", estimator="coordinate", rule="cocd")
    for optimizer in (
        torch.optim.Adam(zo.coordinates(), lr=1e-2),
        torch.optim.SGD(zo.coordinates(), lr=1e-2, momentum=0.9),
    ):
        with pytest.raises(ValueError, match=r"zo_rule='cocd' keeps its own memory.*use optim='sgd'"):
            zo.prepare(optimizer)


def test_signs_of_single_coordinates_are_not_averaged() -> None:
    model, loss = linear_task()
    zo, _ = engine(model, "sign", estimator="coordinate", subspace="full", num_directions=4)
    zo.estimate(loss)
    moved = torch.cat([g.flatten() for g in gradients(zo).values()])
    assert moved[moved != 0].abs().tolist() == [1.0] * 4


def test_a_rule_without_scale_keeps_the_default_learning_rate(tmp_path: Path) -> None:
    """FZOO's own default undoes a scale of c that these divide out anyway."""
    rates = {}
    for name, more in {"plain": {}, "sign": {"zo_rule": "sign"}, "normalized": {"zo_normalize": True}}.items():
        trainer = make_trainer(
            tmp_path, zo_estimator="fzoo", zo_num_directions=2, learning_rate=None, max_steps=1, **more
        )
        trainer.create_optimizer()
        rates[name] = trainer.optimizer.param_groups[0]["lr"]
        trainer._finish_zeroth_order()
    assert rates == {"plain": pytest.approx(1e-8), "sign": 1e-5, "normalized": 1e-5}


def test_forward_gradients_along_a_few_layers_of_all_weights_are_refused() -> None:
    model = seeded(tiny_llama, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"zo_direction='layers'.*use zo_subspace='low_rank'"):
        ZerothOrder(model, "full", estimator="forward_gradient", direction="layers")


def test_a_replay_does_not_ask_for_what_only_forward_passes_need(tmp_path: Path) -> None:
    options = {"zo_estimator": "forward_gradient", "max_steps": 3}
    after = weights_of(trained(tmp_path, seeded(tiny_llama, attn_implementation="eager"), **options).model)
    assert_same_bits(weights_of(replay(seeded(tiny_llama, attn_implementation="sdpa"), tmp_path)), after)


def test_a_checkpoint_from_before_there_was_an_order_of_coordinates_is_continued() -> None:
    zo, _ = engine(linear_task()[0], "none")
    settings = zo.saved_settings()
    assert "zo_coordinate_order" not in settings
    # Later versions have saved None where the option has no effect.
    for saved in (settings, settings | {"zo_coordinate_order": None}):
        checkpoint.check_settings(zo, {"settings": saved}, Path("saved"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"zo_coordinate_order": "permuted"},
            "zo_coordinate_order='permuted' has no effect with zo_estimator='two_point'",
        ),
        ({"zo_estimator": "coordinate", "zo_direction": "sphere"}, "zo_direction='sphere' has no effect"),
        ({"zo_curvature_rate": 1.0, "zo_rule": "curvature", "zo_estimator": "second_difference"}, "below 1"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(tmp_path, **options)


def test_the_commands_recipe_gives_way_to_a_budget_and_to_another_estimator() -> None:
    def parsed(*words: str):
        return parse_arguments(["--use_cpu", *words], "zo-hf train", None)[1]

    assert (parsed().max_steps, parsed().learning_rate) == (250, 1e-4)
    assert parsed("--zo_max_forward_passes", "2000").max_steps == -1
    assert parsed("--zo_max_forward_passes", "2000", "--max_steps", "7").max_steps == 7
    assert parsed("--zo_estimator", "fzoo", "--zo_num_directions", "2").learning_rate is None
    assert parsed("--zo_estimator=fzoo", "--zo_num_directions=2", "--learning-rate=3e-8").learning_rate == 3e-8
