"""A checkpoint is the model of its step, and a run that continues from one ends with the bits of a run never cut off."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.conftest import CAUSAL_MODELS, TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.parallel.launch import Running
from tests.trainer.runs import At, SaveAt, logged, make_trainer, trained, with_lora
from zo_hf import ZOTrainer
from zo_hf.checkpoint import BASE_FILE, COORDINATES_FILE, STAGING, STATE_FILE
from zo_hf.trajectory import replay

FOLDS = {"zo_fold_steps": 4, "learning_rate": 1e-3}


def build(subspace: str = "low_rank", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = seeded(tiny_opt, dtype, num_hidden_layers=1)
    return with_lora(model) if subspace == "adapter" else model


RUNS: dict[str, dict[str, Any]] = {
    "low_rank": {},
    "without folds, several epochs": {"zo_fold_steps": 0, "per_device_train_batch_size": 16},
    "adamw with a schedule": {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    },
    "momentum, clipped": {"optim_args": "momentum=0.9", "max_grad_norm": 1.0},
    "adafactor": {"optim": "adafactor"},
    "normalized, with accumulation": {
        "zo_normalize": True,
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
    },
    "three rademacher directions": {"zo_num_directions": 3, "zo_direction": "rademacher"},
    "full": {"zo_subspace": "full", "learning_rate": 1e-4, "weight_decay": 0.1},
    "adapter": {"zo_subspace": "adapter"},
    "adapter adamw": {"zo_subspace": "adapter", "optim": "adamw_torch"},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 adamw": {"dtype": torch.bfloat16, "optim": "adamw_torch", "weight_decay": 0.1},
    "bf16 full": {"dtype": torch.bfloat16, "zo_subspace": "full", "learning_rate": 1e-4},
    "bf16 adapter": {"dtype": torch.bfloat16, "zo_subspace": "adapter"},
    "autocast": {"bf16": True},
}


@pytest.mark.parametrize("name", ["bf16 adamw", "full", "adapter adamw"])
def test_saving_changes_nothing(tmp_path: Path, name: str) -> None:
    options = FOLDS | {"max_steps": 7} | RUNS[name]
    made = options.get("zo_subspace", "low_rank"), options.pop("dtype", torch.float32)
    plain = trained(tmp_path / "plain", build(*made), **options)
    saved = trained(tmp_path / "saved", build(*made), more={"callbacks": [SaveAt(4, 6)]}, **options)
    assert_same_bits(weights_of(saved.model), weights_of(plain.model))


@pytest.mark.parametrize("name", RUNS)
def test_resuming_ends_with_the_same_bits_as_never_stopping(tmp_path: Path, name: str) -> None:
    """From the checkpoint at a fold, and from one between two folds."""
    options = FOLDS | {"max_steps": 9} | RUNS[name]
    subspace, dtype = options.get("zo_subspace", "low_rank"), options.pop("dtype", torch.float32)
    more = {"callbacks": [SaveAt(4, 6)]}
    whole = trained(tmp_path / "saved", build(subspace, dtype), more=more, **options)
    for step in (4, 6) if subspace == "low_rank" else (6,):
        resumed = trained(
            tmp_path / f"from{step}",
            build(subspace, dtype),
            resume=str(tmp_path / "saved" / f"checkpoint-{step}"),
            **options,
        )
        assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
        for key in ("loss", "zo/projected_grad", "zo/forward_passes", "zo/skipped_steps", "learning_rate"):
            assert logged(resumed, key)[step:] == logged(whole, key)[step:], key


@pytest.mark.parametrize("architecture", CAUSAL_MODELS)
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_checkpoint_loads_as_exactly_the_model_of_that_step(
    tmp_path: Path, architecture: str, subspace: str
) -> None:
    """A run that ends at step 2 folds as the checkpoint of step 2 did."""
    options = FOLDS | {"zo_subspace": subspace, "save_strategy": "steps", "weight_decay": 0.1}
    model = seeded(CAUSAL_MODELS[architecture])
    trainer = trained(tmp_path, model, max_steps=2, save_steps=1, **options)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert_same_bits(weights_of(loaded), weights_of(model))
    for step in (1, 2):
        other = type(model).from_pretrained(tmp_path / f"checkpoint-{step}")
        logs = trainer.evaluate()["eval_loss"], make_trainer(tmp_path, other).evaluate()["eval_loss"]
        assert (logs[0] == logs[1]) == (step == 2)


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_the_loss_of_a_checkpoint_is_the_one_evaluated_at_its_step(tmp_path: Path, subspace: str) -> None:
    options = FOLDS | {"zo_subspace": subspace, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trained(tmp_path, build(subspace), save_strategy="steps", save_steps=1, max_steps=5, **options)
    for step, loss in enumerate(logged(trainer, "eval_loss"), start=1):
        folder = tmp_path / f"checkpoint-{step}"
        if subspace == "adapter":
            from peft import PeftModel

            model = PeftModel.from_pretrained(build(), folder)
        else:
            model = type(build()).from_pretrained(folder)
        # Between folds W + BVᵀ is a product beside x·Wᵀ during training and a sum in the file: equal up to rounding.
        exact = subspace != "low_rank" or step % 4 == 0
        again = make_trainer(tmp_path, model).evaluate()["eval_loss"]
        assert again == (loss if exact else pytest.approx(loss, rel=1e-5))


def test_save_model_in_a_callback_saves_the_model_of_that_moment(tmp_path: Path) -> None:
    model = build()
    save = At({2}, lambda state, **kwargs: trainer.save_model(str(tmp_path / "now")))
    trainer = make_trainer(tmp_path / "run", model, more={"callbacks": [save]}, max_steps=6, **FOLDS)
    trainer.train()
    reference = trained(tmp_path / "other", build(), max_steps=2, **FOLDS)
    loaded = type(model).from_pretrained(tmp_path / "now")
    assert_same_bits(weights_of(loaded), weights_of(reference.model))
    trainer.save_model(str(tmp_path / "after"))
    assert_same_bits(weights_of(type(model).from_pretrained(tmp_path / "after")), weights_of(model))


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = build()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    trained(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2, **FOLDS)
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert "lm_head.weight" not in names and "model.decoder.embed_tokens.weight" in names
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert loaded.lm_head.weight is loaded.model.decoder.embed_tokens.weight


# What is on the disk.


def test_base_weights_are_written_between_folds_only_and_shared(tmp_path: Path) -> None:
    trained(tmp_path, build(), save_strategy="steps", save_steps=1, max_steps=7, **FOLDS)
    held = {step: {f.name for f in (tmp_path / f"checkpoint-{step}").iterdir()} for step in range(1, 8)}
    assert BASE_FILE not in held[4] and COORDINATES_FILE not in held[4] and STATE_FILE in held[4]
    for step in (1, 2, 3, 5, 6, 7):
        assert {BASE_FILE, COORDINATES_FILE, STATE_FILE} <= held[step]
    inode = {step: (tmp_path / f"checkpoint-{step}" / BASE_FILE).stat().st_ino for step in held if step != 4}
    assert inode[1] == inode[2] == inode[3] != inode[5]
    assert inode[5] == inode[6] == inode[7]


def test_the_base_file_stays_shared_when_older_checkpoints_are_rotated_away(tmp_path: Path) -> None:
    seen = []

    class Remembers(ZOTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._save_checkpoint(*args, **kwargs)
            folder = tmp_path / f"checkpoint-{self.state.global_step}"
            seen.append(os.stat(folder / BASE_FILE).st_ino)

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "save_total_limit": 1, "zo_fold_steps": 0}
    trained(tmp_path, build(), Remembers, **options)
    assert len(seen) == 5 and len(set(seen)) == 1
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert (tmp_path / "checkpoint-5" / BASE_FILE).stat().st_nlink == 1


def test_without_hard_links_the_base_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: Any, **kwargs: Any) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    options = FOLDS | {"max_steps": 5}
    trained(tmp_path, build(), save_strategy="steps", save_steps=1, **options)
    first, second = (tmp_path / f"checkpoint-{step}" / BASE_FILE for step in (1, 2))
    assert first.read_bytes() == second.read_bytes() and first.stat().st_ino != second.stat().st_ino


@pytest.mark.parametrize("subspace", ["full", "adapter"])
def test_other_subspaces_write_no_base_weights(tmp_path: Path, subspace: str) -> None:
    trained(tmp_path, build(subspace), zo_subspace=subspace, save_strategy="steps", save_steps=3, max_steps=3)
    held = {f.name for f in (tmp_path / "checkpoint-3").iterdir()}
    assert STATE_FILE in held and BASE_FILE not in held


def test_save_only_model_holds_the_model_and_no_engine(tmp_path: Path) -> None:
    model = build()
    options = FOLDS | {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    trained(tmp_path, model, save_only_model=True, **options)
    held = {f.name for f in (tmp_path / "checkpoint-3").iterdir()}
    assert not held & {STATE_FILE, BASE_FILE, COORDINATES_FILE, "optimizer.pt"}
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-3")
    assert_same_bits(weights_of(loaded), weights_of(model))


def test_an_earlier_runs_checkpoint_of_the_same_step_leaves_nothing_behind(tmp_path: Path) -> None:
    """Coordinates of a run that never folds must not be read by one for which step 4 is a fold."""
    options = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3}
    trained(tmp_path, build(), max_steps=4, zo_fold_steps=0, **options)
    assert (tmp_path / "checkpoint-4" / COORDINATES_FILE).exists()
    whole = trained(tmp_path, build(), max_steps=7, zo_fold_steps=4, **options)
    assert not (tmp_path / "checkpoint-4" / COORDINATES_FILE).exists()
    resumed = trained(
        tmp_path / "b", build(), max_steps=7, zo_fold_steps=4, resume=str(tmp_path / "checkpoint-4"), **options
    )
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_a_second_training_writes_its_own_base_weights(tmp_path: Path) -> None:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "zo_fold_steps": 50}
    trainer = make_trainer(tmp_path, build(), **options)
    trainer.train()
    trainer.train()
    resumed = trained(tmp_path, build(), resume=str(tmp_path / "checkpoint-3"), **options)
    assert_same_bits(weights_of(resumed.model), weights_of(trainer.model))


def test_a_checkpoint_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    left = tmp_path / STAGING / "checkpoint-1" / "junk"
    left.parent.mkdir(parents=True)
    left.write_text("of a run that was killed")
    seen: list[Any] = []

    class Watched(ZOTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            seen.append((Path(output_dir).parent.name, [folder.name for folder in tmp_path.glob("checkpoint-*")]))

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, build(), Watched, **options)
    assert seen == [(STAGING, []), (STAGING, ["checkpoint-1"])]
    assert not (tmp_path / STAGING).exists() and not list(tmp_path.rglob("junk"))


def test_the_best_checkpoint_is_known_under_its_own_name_and_kept(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"save_total_limit": 2, "metric_for_best_model": "eval_loss"}
    trainer = trained(tmp_path / "a", build(), **options | {"max_steps": 3})
    best = trainer.state.best_model_checkpoint
    assert best is not None and Path(best).parent == tmp_path / "a" and Path(best).is_dir()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    moved = trained(tmp_path / "b", build(), resume=True, **options)
    best = moved.state.best_model_checkpoint
    assert best is not None and Path(best).parent == tmp_path / "b" and Path(best).is_dir()
    last = sorted((tmp_path / "b").glob("checkpoint-*"))[-1]
    assert json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"] == best


# What does not fit.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("zo_rank", 2),
        ("zo_fold_steps", 5),
        ("zo_eps", 2e-3),
        ("zo_num_directions", 2),
        ("zo_direction", "gaussian"),
        ("zo_normalize", True),
        ("zo_subspace", "full"),
        ("seed", 7),
    ],
)
def test_resuming_with_another_setting_is_refused_in_one_sentence(tmp_path: Path, option: str, value: Any) -> None:
    # Another rank would make an optimizer's state unloadable too; the reason must be the one that is told.
    optim = "sgd" if option == "zo_subspace" else "adamw_torch"
    options = FOLDS | {"save_strategy": "steps", "save_steps": 2, "optim": optim}
    trained(tmp_path, build(), max_steps=2, **options)
    model = build()
    trainer = make_trainer(tmp_path, model, max_steps=4, **options | {option: value})
    with pytest.raises(ValueError) as refusal:
        trainer.train(resume_from_checkpoint=True)
    message = str(refusal.value)
    assert option in message and repr(value) in message
    assert message.endswith(".") and message.count(". ") == 0 and "\n" not in message
    assert trainer.zo is None and not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_stock_trainers_checkpoint_gives_its_weights_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optim: str
) -> None:
    stock_options = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 8, "optim": optim}
    stock_options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 2, "logging_steps": 1}
    model = build()
    Trainer(model, TrainingArguments(**stock_options), train_dataset=TinyTask()).train()
    continued = build()
    with caplog.at_level(logging.WARNING, "zo_hf"):
        trainer = trained(tmp_path, continued, max_steps=3, optim=optim, learning_rate=1e-4, resume=True)
    assert "holds no zeroth-order state" in caplog.text
    assert trainer.state.global_step == 3 and logged(trainer, "zo/forward_passes")[-1] > 0
    before, after = weights_of(model), weights_of(continued)
    distance = max((after[name] - before[name]).abs().max().item() for name in before)
    assert 0 < distance < 0.1
    assert all(torch.allclose(after[name], before[name], atol=0.1) for name in before)


# Checkpoints that were cut off.

# The files that a folder loses, and the one of which half is left.
CUTS = {
    "no trainer_state.json": ({"trainer_state.json"}, None),
    "half of trainer_state.json": (set(), "trainer_state.json"),
    "half of the base weights": ({"trainer_state.json", STATE_FILE, "rng_state.pth", "scheduler.pt"}, BASE_FILE),
    "an empty folder": (None, None),
}


def cut_off(folder: Path, lost: set[str] | None, half: str | None) -> None:
    if half is not None:
        content = (folder / half).read_bytes()
        (folder / half).unlink()  # it may be shared with another checkpoint
        (folder / half).write_bytes(content[: len(content) // 2])
    for file in list(folder.iterdir()):
        if lost is None or file.name in lost:
            file.unlink()


TO_BE_CUT = FOLDS | {"save_strategy": "steps", "save_steps": 1, "max_steps": 7}


@pytest.fixture(scope="module")
def to_be_cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """The folder of a whole run, and the model it ended with."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder, build(), **TO_BE_CUT).model


@pytest.mark.parametrize("cut", CUTS)
def test_an_incomplete_checkpoint_is_passed_over_and_then_replaced(
    tmp_path: Path, to_be_cut: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    whole, expected = to_be_cut[0], weights_of(to_be_cut[1])
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-7")
    cut_off(folder / "checkpoint-6", *CUTS[cut])
    with caplog.at_level(logging.WARNING, "zo_hf"):
        resumed = trained(folder, build(), resume=True, **TO_BE_CUT)
    assert "checkpoint-6 is skipped, because" in caplog.text
    assert_same_bits(weights_of(resumed.model), expected)
    again = trained(tmp_path / "again", build(), resume=str(folder / "checkpoint-6"), **TO_BE_CUT)
    assert_same_bits(weights_of(again.model), expected)


def test_writing_over_a_cut_checkpoint_leaves_the_one_that_shares_its_base_file_alone(tmp_path: Path) -> None:
    options = FOLDS | {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trained(tmp_path, build(), **options)
    shared = tmp_path / "checkpoint-2" / BASE_FILE
    before = shared.read_bytes(), shared.stat().st_mtime_ns
    assert shared.stat().st_ino == (tmp_path / "checkpoint-3" / BASE_FILE).stat().st_ino
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    trained(tmp_path, build(), resume=True, **options)
    assert (shared.read_bytes(), shared.stat().st_mtime_ns) == before


def test_asking_for_an_incomplete_checkpoint_by_name_is_refused(tmp_path: Path) -> None:
    options = FOLDS | {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, build(), max_steps=2, **options)
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    for asked in (str(tmp_path / "checkpoint-2"), True):
        with pytest.raises(ValueError, match="resume_from_checkpoint") as refusal:
            trained(tmp_path, build(), max_steps=4, resume=asked, **options)
        assert str(refusal.value).count(". ") == 0


def test_without_any_checkpoint_resuming_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume_from_checkpoint=True finds no intact checkpoint"):
        trained(tmp_path, build(), resume=True)


def test_only_the_wrapping_of_trainers_save_is_ours() -> None:
    """The loop itself stays the stock one: whoever overrides it silently loses what later versions add."""
    for name in ("_inner_training_loop", "_run_epoch", "_maybe_log_save_evaluate", "_prepare_for_training"):
        assert name not in ZOTrainer.__dict__


# Killed anywhere.

KILLED_RUN = """
import sys
import torch
from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import trained
from zo_hf import checkpoint

folder, resume, rows = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
options = {"max_steps": 60, "save_strategy": "steps", "save_steps": 5, "zo_fold_steps": 10, "optim": "adamw_torch"}
options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
options |= {"lr_scheduler_type": "linear", "save_total_limit": 3, "zo_normalize": True, "zo_rows_per_direction": rows}
print("started", flush=True)
trainer = trained(folder, seeded(tiny_opt, torch.bfloat16), resume=resume, **options)
torch.save(trainer.model.state_dict(), folder + "/final.pt")
"""


def start_killed_run(folder: Path, resume: bool, rows: int) -> Running:
    script = folder.with_suffix(".py")
    script.write_text(KILLED_RUN)
    return Running(script, folder.with_suffix(".log"), folder, "resume" if resume else "new", rows)


def has_complete_checkpoint(folder: Path) -> bool:
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(state.read_text())
            return True
        except ValueError:
            continue
    return False


def staged_files(folder: Path) -> set[Path]:
    """Files of a checkpoint that is being written; the run may rename the folder while it is listed."""
    try:
        return set(folder.glob(f"{STAGING}/*/*"))
    except FileNotFoundError:
        return set()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_killed_ten_times_ends_with_the_bits_of_one_never_killed(tmp_path: Path, rows: int) -> None:
    """Half of the kills fall on a random step, half on a random moment of writing a checkpoint."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    process = start_killed_run(whole, False, rows)
    assert process.wait(300) == 0, process.said()

    chance = random.Random(0)
    kills = halves = 0
    while not (folder / "final.pt").exists():
        resume = has_complete_checkpoint(folder)
        process = start_killed_run(folder, resume, rows)
        in_a_checkpoint, target = kills % 2 == 1, chance.randint(1, 7)
        before = staged_files(folder)
        killed = False
        if kills < 10:
            while process.code is None:
                if in_a_checkpoint and staged_files(folder) - before:
                    time.sleep(chance.uniform(0, 0.03))
                    break
                if not in_a_checkpoint and process.said().count("projected_grad") >= target:
                    time.sleep(chance.uniform(0, 0.05))
                    break
                time.sleep(0.001)
            if process.code is None:
                process.kill()
                killed = True
        assert process.wait(300) == (-signal.SIGKILL if killed else 0), process.said()
        kills += killed
        halves += killed and (folder / STAGING).exists()
        assert all((each / "trainer_state.json").exists() for each in folder.glob("checkpoint-*"))
    assert kills == 10
    assert halves > 0, "no kill fell into the writing of a checkpoint"
    assert_same_bits(torch.load(folder / "final.pt"), torch.load(whole / "final.pt"))
    logs = [(run / "trajectory" / "steps.zolog").read_bytes() for run in (folder, whole)]
    assert logs[0] == logs[1]
    replayed = replay(seeded(tiny_opt, torch.bfloat16), folder)
    assert_same_bits(weights_of(replayed), torch.load(whole / "final.pt"))
