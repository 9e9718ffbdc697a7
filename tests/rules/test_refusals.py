"""Rules say before training, in one sentence, what they cannot work with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rules.helpers import options_of
from tests.trainer.runs import config, make_trainer
from tests.trainer.test_refusals import refused
from zo_hf.rules import RULES

WRONG: list[tuple[str, dict[str, Any]]] = [
    *(
        (f"zo_rule='{name}' does not combine with zo_subspace='full'", options_of(name) | {"zo_subspace": "full"})
        for name, rule in RULES.items()
        if rule.needs_tensors
    ),
    ("use zo_estimator='second_difference'", {"zo_rule": "curvature"}),
    ("zo_num_directions=1", {"zo_rule": "muon"}),
    ("zo_num_directions=1", {"zo_rule": "power_iteration"}),
    ("zo_momentum=0.9 has no effect", {"zo_momentum": 0.9}),
    ("zo_momentum=0.9 has no effect", {"zo_momentum": 0.9, "zo_rule": "sign"}),
    ("zo_spectral_rank=2 has no effect", {"zo_spectral_rank": 2, "zo_rule": "muon", "zo_num_directions": 2}),
    ("zo_curvature_rate=0.1 has no effect", {"zo_curvature_rate": 0.1}),
    ("zo_momentum_at_fold='reset' has no effect", {"zo_momentum_at_fold": "reset"}),
    ("zo_momentum=1.0 must", {"zo_rule": "muon", "zo_momentum": 1.0}),
    ("zo_momentum=-0.1 must", {"zo_rule": "muon", "zo_momentum": -0.1}),
    ("zo_momentum_at_fold='forget' must", {"zo_rule": "muon", "zo_momentum_at_fold": "forget"}),
    ("zo_spectral_rank=0 must", {"zo_rule": "power_iteration", "zo_spectral_rank": 0}),
    ("zo_curvature_rate=2.0 must", {"zo_rule": "curvature", "zo_curvature_rate": 2.0}),
    ("max_grad_norm=1.0", {"zo_rule": "conservative", "max_grad_norm": 1.0}),
    ("zo_rule", {"zo_rule": "signs"}),
]


@pytest.mark.parametrize(("about", "options"), WRONG, ids=[str(options) for _, options in WRONG])
def test_the_configuration_refuses(tmp_path: Path, about: str, options: dict[str, Any]) -> None:
    refused(about, lambda: config(tmp_path, **options))


@pytest.mark.parametrize("options", [{"optim": "adamw_torch"}, {"optim_args": "momentum=0.9"}], ids=str)
def test_conservative_compares_steps_of_plain_descent_only(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, zo_rule="conservative", **options)
    refused("zo_rule='conservative' compares", trainer.train)
    assert trainer.state.global_step == 0
    assert not any("forward" in module.__dict__ for module in trainer.model.modules())


@pytest.mark.parametrize("rule", ["muon", "power_iteration"])
def test_momentum_makes_a_single_direction_enough(tmp_path: Path, rule: str) -> None:
    config(tmp_path, zo_rule=rule, zo_momentum=0.9)
