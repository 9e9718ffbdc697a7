"""A run that has ended takes no step when it is resumed, and ends with the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import EarlyStoppingCallback

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import trained

SAVED = {"save_strategy": "steps", "save_steps": 1, "zo_fold_steps": 3, "learning_rate": 1e-3}
#: The options with which a run ends, and what the resumed run says.
ENDS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"max_steps": 5}, "it has taken 5 of 5 steps"),
    "fewer steps than were taken": ({"max_steps": 5}, "it has taken 5 of 3 steps"),
    "epochs": ({"max_steps": -1, "num_train_epochs": 0.7}, "it has taken 6 of 6 steps"),
    "forward passes": ({"max_steps": -1, "zo_max_forward_passes": 11}, "zo_max_forward_passes is spent"),
    "forward passes before steps": ({"max_steps": 9, "zo_max_forward_passes": 11}, "zo_max_forward_passes is spent"),
    "time": ({"max_steps": 500, "zo_max_time": 1e-3}, "zo_max_time is spent"),
}


def build() -> nn.Module:
    return seeded(tiny_opt, num_hidden_layers=1)


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_has_ended_takes_no_further_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    options, said = ENDS[end]
    whole = trained(tmp_path, build(), **SAVED | options)
    again = {"max_steps": 3} if end.startswith("fewer") else {}
    with caplog.at_level(logging.WARNING, "zo_hf"):
        resumed = trained(tmp_path, build(), resume=True, **SAVED | options | again)
    assert resumed.state.global_step == whole.state.global_step
    assert said in caplog.text
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_a_run_that_was_stopped_early_goes_on_with_more_patience_only(tmp_path: Path) -> None:
    options = SAVED | {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 20}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "learning_rate": 1e-9}

    def run(patience: int, **more: Any) -> Any:
        stop = EarlyStoppingCallback(patience, 1.0)
        return trained(tmp_path, build(), more={"callbacks": [stop]}, **more, **options)

    whole = run(2)
    assert whole.state.global_step == 3
    resumed = run(2, resume=True)
    assert resumed.state.global_step == 3
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert run(4, resume=True).state.global_step > 3
