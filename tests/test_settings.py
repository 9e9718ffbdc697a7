"""The record of a run's method: one place for an option, shared by `ZOConfig`, engine, checkpoint, log and replay."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import config
from zo_hf import ZerothOrder, ZOConfig, checkpoint
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.rules import RULES
from zo_hf.settings import Settings
from zo_hf.subspaces import SUBSPACES, LowRank

OF_CONFIG = {option.name: option for option in fields(ZOConfig)}


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda setting: setting.name)
def test_the_config_has_every_setting_with_its_help_and_default(setting) -> None:
    if setting.name == "seed":
        return  # Trainer's own
    option = OF_CONFIG[f"zo_{setting.name}"]
    assert option.metadata["help"] == setting.metadata["help"]
    assert option.default == (
        "auto" if setting.name in ("eps", "rows_per_direction", "direction") else setting.default
    )


def test_a_config_gives_its_settings(tmp_path: Path) -> None:
    given = {"rank": 2, "fold_steps": 0, "estimator": "fzoo", "num_directions": 3, "direction": "rademacher"}
    args = config(tmp_path, seed=7, **{f"zo_{name}": value for name, value in given.items()})
    assert args.settings() == Settings(seed=7, **given)


def test_words_of_a_command_line_or_of_a_search_are_numbers_in_the_settings(tmp_path: Path) -> None:
    args = config(tmp_path, zo_eps="0.01")
    assert args.settings().eps == 0.01
    args.zo_eps = "3e-4"  # as Trainer's hyperparameter search sets it
    assert args.settings().eps == 3e-4


def test_the_record_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().rank = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "alias", "name"),
    [
        ("rule", "hizoo", "curvature"),
        ("rule", "mopi", "power_iteration"),
        ("direction", "lezo", "layers"),
        ("estimator", "es", "evolution"),
    ],
)
def test_papers_names_of_methods_are_accepted(option: str, alias: str, name: str) -> None:
    assert getattr(Settings(**{option: alias}), option) == name


def test_no_two_methods_share_a_name() -> None:
    for registry in (RULES, DISTRIBUTIONS, ESTIMATORS, SUBSPACES):
        names = [name for kind in registry.values() for name in (kind.name, *kind.aliases)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "option", ["subspace", "estimator", "direction", "rule", "coordinate_order", "batched_probes"]
)
def test_an_unknown_name_is_refused_with_the_known_ones(option: str) -> None:
    with pytest.raises(ValueError, match=rf"zo_{option}='other' (is unknown; choose|must be) one of \w+, "):
        Settings(**{option: "other"})


settings = st.builds(
    Settings,
    subspace=st.sampled_from(sorted(SUBSPACES)),
    rank=st.none() | st.integers(1, 64),
    fold_steps=st.none() | st.integers(0, 100),
    eps=st.none() | st.floats(1e-6, 1.0),
    estimator=st.sampled_from(sorted(ESTIMATORS)),
    num_directions=st.integers(1, 64),
    direction=st.sampled_from(sorted(DISTRIBUTIONS)),
    active_layers=st.none() | st.floats(0.01, 1.0),
    rule=st.sampled_from(sorted(RULES)),
    momentum=st.floats(0, 0.99),
    svrg_steps=st.integers(1, 9),
    max_projected_grad=st.none() | st.floats(0, 1e6),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31),
)


@given(settings)
def test_saved_settings_come_back_as_far_as_the_method_uses_them(given: Settings) -> None:
    saved = given.to_saved()
    back = Settings.from_saved(saved)
    assert back.to_saved() == saved
    assert all(getattr(back, name) == getattr(given, name) for name in ("estimator", "rule", "seed", "rank", "momentum")
               if name != "momentum" or "momentum" in RULES[given.rule].uses)  # fmt: skip


def test_options_may_be_keywords_of_the_engine() -> None:
    by_keywords = ZerothOrder(nn.Linear(8, 8), rank=2, estimator="fzoo", num_directions=4)
    by_record = ZerothOrder(nn.Linear(8, 8), Settings(rank=2, estimator="fzoo", num_directions=4))
    assert by_keywords.saved_settings() == by_record.saved_settings()


def test_an_option_beside_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=2 is given beside settings=\.\.\.; set rank in the Settings"):
        ZerothOrder(nn.Linear(8, 8), Settings(), rank=2)


def test_the_engine_takes_a_subspace_by_name_or_made() -> None:
    model = seeded(tiny_opt)
    space = LowRank(model, 2, 0)
    assert ZerothOrder(model, space).subspace is space
    assert ZerothOrder(seeded(tiny_opt), "norms").settings.subspace == "norms"
    assert ZerothOrder(seeded(tiny_opt), subspace="norms").settings.subspace == "norms"


def test_a_checkpoint_from_before_an_option_is_continued_with_its_default(tmp_path: Path) -> None:
    saved = ZerothOrder(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), direction="layers").saved_settings()
    older = {name: value for name, value in saved.items() if name != "zo_normalize"}
    again = ZerothOrder(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), direction="layers")
    checkpoint.check_settings(again, {"settings": older}, tmp_path)
    other = ZerothOrder(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), direction="layers", normalize=True)
    with pytest.raises(ValueError, match=r"zo_normalize=False and this run has zo_normalize=True"):
        checkpoint.check_settings(other, {"settings": older}, tmp_path)


@pytest.mark.parametrize(
    ("given", "direction"),
    [
        ({}, "rademacher"),
        ({"zo_rows_per_direction": 2}, "rademacher"),
        ({"zo_rows_per_direction": 0}, "gaussian"),
        ({"zo_subspace": "full"}, "gaussian"),
        ({"zo_direction": "gaussian"}, "gaussian"),
        # HiZOO learns from the squares of a direction's entries.
        ({"zo_rows_per_direction": 1, "zo_rule": "curvature", "zo_estimator": "second_difference"}, "gaussian"),
        ({"zo_estimator": "coordinate"}, "gaussian"),
    ],
)
def test_auto_draws_signs_for_rows(tmp_path: Path, given: dict, direction: str) -> None:
    assert config(tmp_path, **given).settings().direction == direction
