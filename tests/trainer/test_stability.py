"""`zo_stability_steps` in training: what it costs, changes and leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.parallel.launch import run
from tests.stability.bowls import Bowl, Nothing
from tests.trainer.runs import SaveAt, config, logged, make_trainer, passes_of_steps, trained
from zo_hf import ZOConfig, ZOTrainer
from zo_hf.stability import critical_step_size
from zo_hf.stability.monitor import SAFETY, StabilityCallback
from zo_hf.trajectory import read_trajectory, replay

KEYS = ("zo/hessian_trace", "zo/hessian_trace_error", "zo/lambda_max", "zo/stability_ratio")
CRITICAL = critical_step_size([1.0] * 50)
BEYOND = {"learning_rate": 1.5 * CRITICAL, "zo_fold_steps": 0, "zo_eps": 1e-2, "max_grad_norm": 0.0}


def bowl(folder: Path, **options: Any) -> ZOTrainer:
    """A trained trainer of a bowl of 50 dimensions, along Gaussian directions, for which its critical rate is."""
    more = {"train_dataset": Nothing(), "eval_dataset": None} | options.pop("more", {})
    return trained(folder, Bowl(1.0, 50), more=more, **BEYOND | {"zo_direction": "gaussian"} | options)


def small() -> Any:
    return seeded(tiny_opt, num_hidden_layers=1)


# With zo_stability_steps=2, beyond the passes of the run without it, after each of four steps.
COSTS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "two_point": ({}, [1, 1, 2, 2]),
    "batched": ({"zo_batched_probes": "auto"}, [1, 1, 2, 2]),
    "full": ({"zo_subspace": "full"}, [1, 1, 2, 2]),
    "two directions": ({"zo_num_directions": 2}, [1, 1, 2, 2]),
    "one_sided": ({"zo_estimator": "one_sided", "zo_num_directions": 2}, [1, 1, 2, 2]),
    "second_difference": ({"zo_estimator": "second_difference"}, [0, 0, 0, 0]),
    "curvature": ({"zo_estimator": "second_difference", "zo_rule": "curvature"}, [0, 0, 0, 0]),
    "adam": ({"optim": "adamw_torch", "learning_rate": 1e-3}, [0, 0, 3, 3]),
    "normalized": ({"zo_normalize": True, "learning_rate": 1e-3}, [1, 1, 2, 2]),
    "micro-batches": ({"gradient_accumulation_steps": 3}, [3, 3, 6, 6]),
    "rows": ({"zo_rows_per_direction": 1, "gradient_accumulation_steps": 2}, [2, 2, 4, 4]),
    "one_sided rows": ({"zo_rows_per_direction": 2, "zo_estimator": "one_sided"}, [1, 1, 2, 2]),
    "adam rows": ({"zo_rows_per_direction": 1, "optim": "adamw_torch", "learning_rate": 1e-3}, [0, 0, 3, 3]),
}


@pytest.mark.parametrize("name", COSTS)
def test_what_it_costs_is_counted_and_no_bit_changes(tmp_path: Path, name: str) -> None:
    options, extra = COSTS[name]
    options = {"zo_batched_probes": False, "zo_rows_per_direction": 0, "per_device_train_batch_size": 4} | options
    with_it = trained(tmp_path / "with", small(), zo_stability_steps=2, **options)
    without = trained(tmp_path / "without", small(), **options)
    assert [a - b for a, b in zip(passes_of_steps(with_it), passes_of_steps(without), strict=True)] == extra
    for key in ("loss", "zo/projected_grad", "learning_rate", "grad_norm"):
        assert logged(with_it, key) == logged(without, key)
    assert_same_bits(weights_of(with_it.model), weights_of(without.model))
    first = 2 if "adam" in name else 0
    assert len(logged(with_it, "zo/hessian_trace")) == 4 - first and not logged(without, "zo/hessian_trace")
    # Not one pass too many: one less than three steps take pays for two.
    options["max_steps"] = -1
    total = passes_of_steps(with_it)[2]
    for budget, expected in ((total, 3), (total - 1, 2)):
        limited = trained(tmp_path / "limited", small(), zo_stability_steps=2, zo_max_forward_passes=budget, **options)
        assert passes_of_steps(limited) == passes_of_steps(with_it)[:expected]


def test_schedules_end_where_the_budget_does(tmp_path: Path) -> None:
    options = {"zo_batched_probes": False, "lr_scheduler_type": "linear", "zo_stability_steps": 3}
    options |= {"zo_rows_per_direction": 0}
    reference = trained(tmp_path, max_steps=9, **options)
    limited = trained(tmp_path, max_steps=-1, zo_max_forward_passes=9 * 2 + 3, **options)
    assert limited.state.max_steps == 9
    assert logged(limited, "learning_rate") == logged(reference, "learning_rate")


def test_it_warns_and_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = bowl(tmp_path, zo_stability_steps=1, max_steps=20)
    (record,) = (record for record in caplog.records if "zo_stability_action='cap'" in record.getMessage())
    assert "1.5 times" in record.getMessage() or "critical learning rate" in record.getMessage()
    ratios = logged(trainer, "zo/stability_ratio")
    assert len(ratios) == 20 and ratios[-1] == pytest.approx(1.5, rel=0.15)
    for entry in trainer.state.log_history[4:20]:
        assert entry["zo/critical_lr_lower"] <= entry["zo/critical_lr_upper"]
        assert entry["zo/stability_ratio"] == entry["learning_rate"] / entry["zo/critical_lr_upper"]
        assert all(key in entry for key in KEYS)


def test_cap_saves_a_run_and_a_replay_follows_it(tmp_path: Path) -> None:
    losses = {}
    for action in ("warn", "cap"):
        folder = tmp_path / action
        options = {"zo_stability_steps": 5, "zo_stability_action": action, "lr_scheduler_type": "linear"}
        trainer = bowl(folder, max_steps=200, learning_rate=4 * CRITICAL, logging_steps=10, **options | {"seed": 1})
        losses[action] = trainer.model.loss().item()
    assert losses["warn"] > 1e3 and losses["cap"] < 1.0
    again = Bowl(1.0, 50)
    replay(again, tmp_path / "cap")
    assert_same_bits(weights_of(again), weights_of(trainer.model))
    rates = [record.learning_rates[0] for record in read_trajectory(tmp_path / "cap").records]
    schedule = [4 * CRITICAL * (1 - step / 200) for step in range(200)]
    capped = [rate < scheduled * (1 - 1e-9) for rate, scheduled in zip(rates, schedule, strict=True)]
    assert capped[0] and not any(capped[-20:]), "where the schedule is below the cap it is left alone"
    assert max(rates) < CRITICAL
    assert rates[9] == logged(trainer, "learning_rate")[0]


@pytest.mark.parametrize("action", ["warn", "cap"])
@pytest.mark.parametrize("only_trajectory", [False, True])
def test_resuming_ends_with_the_same_bits(tmp_path: Path, action: str, only_trajectory: bool) -> None:
    options = {"zo_stability_steps": 3, "zo_stability_action": action, "lr_scheduler_type": "cosine"}
    options |= {"max_steps": 20, "save_only_trajectory": only_trajectory, "optim_args": "momentum=0.5"}
    if only_trajectory:
        options |= {"optim_args": None}
    whole = bowl(tmp_path / "whole", **options)
    saved = bowl(tmp_path / "saved", more={"callbacks": [SaveAt(7)]}, **options)
    assert_same_bits(weights_of(saved.model), weights_of(whole.model))
    resumed = bowl(tmp_path / "saved", resume=str(tmp_path / "saved" / "checkpoint-7"), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    for key in (*KEYS, "loss", "learning_rate", "zo/forward_passes", "zo/critical_lr_lower"):
        assert logged(resumed, key)[-13:] == logged(whole, key)[-13:], key


def test_adam_resumes_too(tmp_path: Path) -> None:
    options = {"zo_stability_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 8}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "saved", more={"callbacks": [SaveAt(5)]}, **options)
    resumed = trained(tmp_path / "saved", resume=str(tmp_path / "saved" / "checkpoint-5"), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    for key in (*KEYS, "zo/forward_passes"):
        assert logged(resumed, key)[-3:] == logged(whole, key)[-3:], key


def test_a_checkpoint_without_it_is_gone_on_with(tmp_path: Path) -> None:
    trained(tmp_path, more={"callbacks": [SaveAt(2)]}, zo_rows_per_direction=0)
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), zo_stability_steps=1)
    assert len(logged(resumed, "zo/hessian_trace")) == 2


def test_a_callback_is_the_same_as_the_options(tmp_path: Path) -> None:
    options = {"max_steps": 12, "zo_max_forward_passes": 30}
    by_options = bowl(tmp_path, zo_stability_steps=2, zo_stability_action="cap", **options)
    by_callback = bowl(tmp_path, more={"callbacks": [StabilityCallback(2, "cap")]}, **options)
    assert by_callback.state.log_history[:-1] == by_options.state.log_history[:-1]
    assert_same_bits(weights_of(by_callback.model), weights_of(by_options.model))
    with pytest.raises(
        ValueError,
        match=r"^zo_stability_steps=2 does not combine with zo_rule='sign': the theory has no critical learning rate",
    ):
        make_trainer(tmp_path, more={"callbacks": [StabilityCallback(2)]}, zo_rule="sign")


def test_a_second_training_begins_anew(tmp_path: Path) -> None:
    trainer = bowl(tmp_path, zo_stability_steps=1, max_steps=5)
    first = logged(trainer, "zo/hessian_trace")
    with torch.no_grad():
        trainer.model.w.fill_(1.0)
    trainer.train()
    assert logged(trainer, "zo/hessian_trace") == pytest.approx(first)


def test_an_optimizer_of_the_users_is_let_go(tmp_path: Path) -> None:
    model = Bowl(1.0, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    more = {"train_dataset": Nothing(), "eval_dataset": None, "optimizers": (optimizer, None)}
    trainer = trained(tmp_path, model, more=more, zo_stability_steps=1, **BEYOND)
    assert len(logged(trainer, "zo/hessian_trace")) == 4
    assert not optimizer._optimizer_step_pre_hooks


REFUSED = {
    "steps": ({"zo_stability_steps": -1}, "zo_stability_steps=-1 must be a whole number of at least 0"),
    "action": (
        {"zo_stability_steps": 1, "zo_stability_action": "stop"},
        "zo_stability_action='stop' must be one of warn, cap",
    ),
    "nothing to do": ({"zo_stability_action": "cap"}, "zo_stability_action='cap' has no effect"),
    **{
        f"{option}={value}": ({"zo_stability_steps": 1, option: value, "zo_num_directions": 2}, f"{option}='{value}'")
        for option, values in {
            "zo_estimator": ("fzoo", "evolution", "evolution_ranks", "forward_gradient", "coordinate"),
            "zo_rule": ("sign", "conservative", "muon"),
            "zo_direction": ("orthogonal", "layers"),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(tmp_path: Path, name: str) -> None:
    options, said = REFUSED[name]
    with pytest.raises(ValueError, match="zo_stability_") as error:
        config(tmp_path, **options)
    assert said in str(error.value) and str(error.value).count(".") == 1


def test_an_optimizer_that_is_not_known_is_refused_before_training(tmp_path: Path) -> None:
    for options in ({"optim_args": "momentum=0.9,nesterov=True"}, {"optim": "adafactor"}):
        with pytest.raises(ValueError, match=r"^zo_stability_steps knows no critical learning rate of this"):
            trained(tmp_path, zo_stability_steps=1, **options)


def test_the_options_default_to_nothing() -> None:
    fields = ZOConfig.__dataclass_fields__
    assert fields["zo_stability_steps"].default == 0 and fields["zo_stability_action"].default == "warn"
    assert str(SAFETY) in fields["zo_stability_action"].metadata["help"]


SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from tests.conftest import weights_of
from tests.trainer.test_stability import bowl, logged, ranks_trainer

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
result = {}
for parallel in ("data", "directions"):
    trainer = ranks_trainer(folder / parallel, parallel)
    result[parallel] = trainer.state.log_history[:-1], weights_of(trainer.model)
    trainer = bowl(folder / f"bowl-{parallel}", zo_parallel=parallel, zo_num_directions=2, max_steps=10,
                   zo_stability_steps=2, zo_stability_action="cap")
    result[f"bowl-{parallel}"] = trainer.state.log_history[:-1], weights_of(trainer.model)
torch.save(result, folder / f"{rank}.pt")
"""


def ranks_trainer(folder: Path, parallel: str) -> ZOTrainer:
    options = {"zo_parallel": parallel, "zo_num_directions": 2, "zo_stability_steps": 2, "zo_batched_probes": False}
    return trained(folder, seeded(tiny_opt), max_steps=5, per_device_train_batch_size=4, **options)


@pytest.mark.slow
def test_two_ranks_find_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run(script, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in first:
        assert first[name][0] == second[name][0]
        assert_same_bits(first[name][1], second[name][1])
    alone = bowl(
        tmp_path / "alone", zo_num_directions=2, max_steps=10, zo_stability_steps=2, zo_stability_action="cap"
    )
    for name in ("bowl-data", "bowl-directions"):
        assert [e["zo/stability_ratio"] for e in first[name][0]] == pytest.approx(logged(alone, "zo/stability_ratio"))
        assert [e["zo/forward_passes"] for e in first[name][0]] == logged(alone, "zo/forward_passes")
