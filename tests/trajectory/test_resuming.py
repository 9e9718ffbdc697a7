"""The log across kills, and checkpoints that consist of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import At, SaveAt, logged, make_trainer, trained, with_lora
from zo_hf import ZOConfig, ZOTrainer
from zo_hf.trainer import manifest
from zo_hf.trajectory import TrajectoryError, read_trajectory, replay
from zo_hf.trajectory.log import Writer

OPTIONS: dict[str, Any] = {"max_steps": 9, "zo_fold_steps": 4, "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "low_rank": {},
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "normalized and clipped": {"zo_normalize": True, "learning_rate": 1e-4, "max_grad_norm": 1.0},
    "momentum": {"optim_args": "momentum=0.9", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "full": {"zo_subspace": "full", "weight_decay": 0.1, "lr_scheduler_type": "linear"},
    "adapter": {"zo_subspace": "adapter", "optim": "adamw_torch"},
    "activation": {"zo_basis": "activation", "optim": "adamw_torch"},
    "divided by inputs": {"zo_preconditioner": "inputs", "zo_rows_per_direction": 1},
    "divided by inputs, autocast": {"zo_preconditioner": "inputs", "bf16": True},
    "bf16": {"dtype": torch.bfloat16, "optim": "adamw_torch"},
}


def build(subspace: str = "low_rank", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    model = seeded(tiny_opt, dtype, seed, num_hidden_layers=1)
    return with_lora(model) if subspace == "adapter" else model


def log_of(folder: Path) -> bytes:
    return (folder / "trajectory" / "steps.zolog").read_bytes()


def stopped(folder: Path, step: int, *args: Any, **options: Any) -> None:
    """A run that is killed at the end of a step: as after a kill, its last checkpoint is an earlier one."""

    class Killed(Exception):
        pass

    def kill(state: Any, **kwargs: Any) -> None:
        raise Killed

    more = {"callbacks": [SaveAt(3), At({step}, kill)]}
    trainer = make_trainer(folder, *args, more=more, **options)
    with pytest.raises(Killed):
        trainer.train()


@pytest.mark.parametrize("only", [False, True], ids=["tensors", "only the log"])
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_equals_never_stopped(tmp_path: Path, name: str, only: bool) -> None:
    options = OPTIONS | RUNS[name] | {"save_only_trajectory": only}
    made = options.get("zo_subspace", "low_rank"), options.pop("dtype", torch.float32)
    whole = trained(tmp_path / "whole", build(*made), **options)
    stopped(tmp_path / "killed", 6, build(*made), **options)
    assert read_trajectory(tmp_path / "killed").steps == 6
    resumed = trained(tmp_path / "killed", build(*made), resume=True, **options)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    for key in ("loss", "zo/projected_grad", "zo/forward_passes", "learning_rate", "grad_norm"):
        assert logged(resumed, key)[3:] == logged(whole, key)[3:], key
    assert_same_bits(weights_of(replay(build(*made), tmp_path / "killed")), weights_of(whole.model))


def test_resuming_into_another_folder_takes_the_log_along(tmp_path: Path) -> None:
    trained(tmp_path / "a", build("adapter"), more={"callbacks": [SaveAt(3)]}, **OPTIONS)
    resumed = trained(tmp_path / "b", build("adapter"), resume=str(tmp_path / "a" / "checkpoint-3"), **OPTIONS)
    assert log_of(tmp_path / "b") == log_of(tmp_path / "a")
    assert_same_bits(weights_of(replay(build("adapter"), tmp_path / "b")), weights_of(resumed.model))


# A log that does not lead to the checkpoint.


def missing(folder: Path) -> None:
    shutil.rmtree(folder / "trajectory")


def too_short(folder: Path) -> None:
    trajectory = read_trajectory(folder)
    Writer.resume(trajectory, 2, trajectory.path).close()


def damaged(folder: Path) -> None:
    content = bytearray(log_of(folder))
    content[read_trajectory(folder).start + 20] ^= 1
    (folder / "trajectory" / "steps.zolog").write_bytes(content)


def of_another_run(folder: Path) -> None:
    trained(folder, build(), **OPTIONS | {"seed": 7})


@pytest.mark.parametrize("harm", [missing, too_short, damaged, of_another_run])
def test_a_log_that_does_not_lead_to_the_checkpoint_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Any
) -> None:
    whole = trained(tmp_path, build(), more={"callbacks": [SaveAt(3)]}, **OPTIONS)
    harm(tmp_path)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        resumed = trained(tmp_path, build(), resume=True, **OPTIONS)
    assert caplog.text.count("does not begin at the base model") == 1
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    late = read_trajectory(tmp_path)
    assert (late.first_step, late.steps) == (3, 9)
    with pytest.raises(TrajectoryError, match="begins at step 3 and not at a base model"):
        replay(build(), tmp_path)


def test_a_late_log_is_continued_too(tmp_path: Path) -> None:
    trained(tmp_path, build(), more={"callbacks": [SaveAt(3)]}, **OPTIONS)
    missing(tmp_path)
    trained(tmp_path, build(), resume=True, more={"callbacks": [SaveAt(6)]}, **OPTIONS)
    before = log_of(tmp_path)
    trained(tmp_path, build(), resume=True, **OPTIONS)
    assert log_of(tmp_path) == before


def test_a_new_run_keeps_the_log_of_the_one_before(tmp_path: Path) -> None:
    trained(tmp_path, build(), **OPTIONS)
    first = log_of(tmp_path)
    trained(tmp_path, build(), **OPTIONS | {"seed": 7})
    assert log_of(tmp_path) != first == (tmp_path / "_trajectory.previous" / "steps.zolog").read_bytes()
    make_trainer(tmp_path, build(), **OPTIONS)
    assert read_trajectory(tmp_path).header["settings"]["seed"] == 7


def test_a_full_disk_ends_the_log_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    append = Writer.append

    def full(self: Writer, record: Any) -> None:
        if record.step >= 2:
            raise OSError(28, "No space left on device")
        append(self, record)

    whole = trained(tmp_path / "whole", build(), **OPTIONS)
    monkeypatch.setattr(Writer, "append", full)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        trainer = trained(tmp_path / "full", build(), more={"callbacks": [SaveAt(3)]}, **OPTIONS)
    assert caplog.text.count("is not complete and ends here: [Errno 28]") == 1
    assert read_trajectory(tmp_path / "full").steps == 2
    assert_same_bits(weights_of(trainer.model), weights_of(whole.model))
    with pytest.raises(OSError):
        trained(tmp_path / "only", build(), save_only_trajectory=True, **OPTIONS)


# Checkpoints of kilobytes.


def test_a_checkpoint_of_a_trajectory_is_kilobytes_and_the_saved_model_whole(tmp_path: Path) -> None:
    options = {"save_only_trajectory": True, "save_strategy": "steps", "save_steps": 20, "logging_steps": 20}
    model = build()
    trainer = trained(tmp_path, model, optim="adamw_torch", learning_rate=1e-3, max_steps=40, **options)
    held = {
        f.relative_to(tmp_path / "checkpoint-40"): f.stat().st_size for f in (tmp_path / "checkpoint-40").rglob("*")
    }
    assert {str(path) for path in held} == {
        "trajectory",
        "trajectory/steps.zolog",
        "zo_state.json",
        "zo_manifest.json",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    assert sum(held.values()) < 64 * 1024
    assert_same_bits(weights_of(replay(build(), tmp_path / "checkpoint-40")), weights_of(model))
    trainer.save_model()
    assert_same_bits(weights_of(type(model).from_pretrained(tmp_path)), weights_of(model))


def test_save_model_in_a_callback_is_whole_too(tmp_path: Path) -> None:
    model = build()
    save = At({2}, lambda state, **kwargs: trainer.save_model(str(tmp_path / "now")))
    trainer = make_trainer(tmp_path / "run", model, more={"callbacks": [save]}, save_only_trajectory=True, **OPTIONS)
    trainer.train()
    loaded = type(model).from_pretrained(tmp_path / "now")
    assert_same_bits(weights_of(loaded), weights_of(replay(build(), tmp_path / "run", until=2)))


def test_only_the_base_model_resumes_from_a_trajectory(tmp_path: Path) -> None:
    options = OPTIONS | {"save_only_trajectory": True}
    trained(tmp_path, build(), more={"callbacks": [SaveAt(3)]}, **options)
    other = build(seed=1)
    before = weights_of(other)
    with pytest.raises(TrajectoryError, match="its weights differ"):
        trained(tmp_path, other, resume=True, **options)
    assert_same_bits(weights_of(other), before)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"zo_rank": 2}, "zo_rank"),
        ({"seed": 7}, "seed"),
        ({"weight_decay": 0.5}, "weight_decay"),
        ({"optim": "adamw_torch"}, "optim='SGD' and this run has optim='AdamW'"),
    ],
)
def test_resuming_from_a_trajectory_with_other_settings_is_refused(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    options = OPTIONS | {"save_only_trajectory": True}
    trained(tmp_path, build(), more={"callbacks": [SaveAt(3)]}, **options)
    with pytest.raises(ValueError, match=named) as error:
        trained(tmp_path, build(), resume=True, **options | changed)
    assert str(error.value).count(". ") == 0


def test_what_cannot_be_replayed_cannot_be_saved_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot replay Adafactor"):
        trained(tmp_path, build(), optim="adafactor", save_only_trajectory=True)
    trained(tmp_path / "late", build(), more={"callbacks": [SaveAt(3)]}, **OPTIONS)
    missing(tmp_path / "late")
    with pytest.raises(ValueError, match="needs the log of the run so far"):
        trained(tmp_path / "late", build(), resume=True, save_only_trajectory=True, **OPTIONS)


@pytest.mark.parametrize("option", ["save_only_model", "load_best_model_at_end", "auto_find_batch_size"])
def test_options_that_exclude_each_other(tmp_path: Path, option: str) -> None:
    more = {"eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match=f"save_only_trajectory=True does not combine with {option}=True"):
        ZOConfig(output_dir=str(tmp_path), save_only_trajectory=True, **{option: True}, **more)


def test_a_trajectory_that_does_not_lead_to_its_checkpoint_is_refused(tmp_path: Path) -> None:
    options = OPTIONS | {"save_only_trajectory": True}
    trained(tmp_path, build(), more={"callbacks": [SaveAt(3)]}, **options)
    state = tmp_path / "checkpoint-3" / "zo_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"trajectory": 1}))
    manifest.write(state.parent)
    with pytest.raises(TrajectoryError, match="does not belong to its checkpoint"):
        trained(tmp_path, build(), resume=True, **options)


# What must go on working.


def test_a_restart_with_a_smaller_batch_begins_a_new_log(tmp_path: Path) -> None:
    class Tight(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["input_ids"]) == 8:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trained(tmp_path / "run", build(), Tight, auto_find_batch_size=True, **OPTIONS)
    assert_same_bits(weights_of(replay(build(), tmp_path / "run")), weights_of(trainer.model))
    assert not (tmp_path / "run" / "_trajectory.previous").exists()


def test_the_best_model_is_loaded_and_the_log_is_of_the_whole_run(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path, build(), **OPTIONS | options)
    best = int(os.path.basename(trainer.state.best_model_checkpoint).split("-")[1])
    assert read_trajectory(tmp_path).steps == 9
    assert_same_bits(weights_of(replay(build(), tmp_path, until=best)), weights_of(trainer.model))


def test_the_log_is_closed_when_training_ends(tmp_path: Path) -> None:
    trainer = trained(tmp_path, build(), max_steps=2)
    assert not trainer._files.records and trainer.zo is None
    trained_again = trainer.train()
    assert trained_again.global_step == 2
    assert read_trajectory(tmp_path).steps == 2
