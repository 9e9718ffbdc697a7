"""docs/guides/trainer_compatibility.md lists what Trainer has, and its rows are true."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.conftest import TinyTask, seeded, tiny_opt, weights_of
from tests.trainer.runs import config, logged, trained
from zo_hf import forward_only

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainer_compatibility.md"
STATES = ("works", "refused", "no effect")


def rows_of(part: str) -> dict[str, str]:
    """The state of every name in a part of the page ("Methods" or "Options").

    Raises:
        AssertionError: a name is in two rows, or a state is unknown.
    """
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {part}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    named = [(name, row[1].strip()) for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert {state for _, state in named} <= set(STATES)
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    assert not twice
    return dict(named)


def test_every_method_of_trainer_is_listed_once() -> None:
    methods = {name for name in vars(Trainer) if callable(getattr(Trainer, name)) and not name.startswith("__")}
    # An older transformers lacks some of the methods.
    assert methods | {"__init__"} <= set(rows_of("Methods"))


def test_every_option_of_trainer_is_listed_once() -> None:
    assert {option.name for option in fields(TrainingArguments)} <= set(rows_of("Options"))


#: Methods that the run below does not reach, because they need another launch, a hub or a search, or are for users to call.
NOT_REACHED = {
    *("init_hf_repo", "push_to_hub", "_push_from_checkpoint", "_hp_search_setup", "_report_to_hp_search"),
    *("hyperparameter_search", "_tune_save_checkpoint", "_update_auto_batch_size", "get_sp_size", "get_cp_size"),
    *("_get_collator_with_removed_columns", "_load_callback_state", "_issue_warnings_after_load", "end"),
    *("pop_callback", "remove_callback", "get_tp_size", "metrics_format", "__init__", "call_model_init"),
}


def counting(counts: Counter) -> type[Trainer]:
    """A subclass that overrides every method that works, counts its calls, and calls super()."""

    def override(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return getattr(super(kind, self), name)(*args, **kwargs)

        return method

    names = [n for n, state in rows_of("Methods").items() if state == "works" and n not in NOT_REACHED]
    names = [name for name in names if hasattr(Trainer, name)]
    kind: Any = type("Counting", (Trainer,), {name: override(name) for name in names})
    counts.update(dict.fromkeys(names, 0))
    return kind


def test_every_override_that_works_is_called_and_changes_nothing_by_itself(tmp_path: Path) -> None:
    counts: Counter = Counter()
    kind, made = forward_only(counting(counts), TrainingArguments)
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "max_grad_norm": 1e6, "include_num_input_tokens_seen": True}
    options |= {"zo_rows_per_direction": 0}  # the loss of a subclass does not come apart
    args = config(tmp_path, made, **options)
    trainer = kind(seeded(tiny_opt), args, train_dataset=TinyTask(), eval_dataset=TinyTask(16))
    trainer.train()
    moved = weights_of(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    metrics = trainer.predict(TinyTask(8)).metrics
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)
    trainer.save_state()
    trainer.create_model_card()
    trainer.create_optimizer_and_scheduler(2)
    trainer.get_learning_rates(), trainer.get_optimizer_group(), trainer.get_num_trainable_parameters()
    not_called = {name for name, count in counts.items() if count == 0}
    assert not_called <= {
        "_remove_unused_columns",
        "_load_best_model",
    }  # of datasets' data sets; checked where they are
    assert counts["training_step"] == 4 + 2 and counts["compute_loss"] >= 2 * (4 + 2)
    reference = trained(tmp_path / "plain", zo_batched_probes=False, **options)
    # A loss in parts rounds otherwise than the whole of it.
    assert all(torch.allclose(t, moved[name], atol=1e-4) for name, t in weights_of(reference.model).items())


#: For every group of options, some of them at other values than their defaults.
GROUPS: dict[str, dict[str, Any]] = {
    "length": {
        "max_steps": -1,
        "num_train_epochs": 0.25,
        "gradient_accumulation_steps": 2,
        "torch_empty_cache_steps": 1,
    },
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 10.0},
    "optimizer": {
        "optim": "adamw_torch",
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "learning_rate": 1e-4,
    },
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.5", "optim_target_modules": ["fc1"]},
    "loss": {
        "label_smoothing_factor": 0.1,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "use_cache": True,
    },
    "kwargs": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "precision": {"bf16": True, "bf16_full_eval": True},
    "logs": {
        "logging_first_step": True,
        "logging_steps": 3,
        "include_num_input_tokens_seen": "all",
        "log_level": "error",
    },
    "memory": {"skip_memory_metrics": False, "logging_nan_inf_filter": False, "run_name": "a run"},
    "evaluation": {
        **{"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_delay": 1},
        **{"eval_accumulation_steps": 1, "eval_do_concat_batches": False, "prediction_loss_only": True},
    },
    "saving": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "save_only_model": True},
    "data": {"dataloader_drop_last": True, "dataloader_pin_memory": False, "data_seed": 3, "seed": 4},
    "sampling": {"train_sampling_strategy": "sequential", "dataloader_in_order": True},
    "processes": {
        "ddp_find_unused_parameters": True,
        "ddp_bucket_cap_mb": 5,
        "accelerator_config": {"split_batches": True},
    },
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_run_with_the_options_of_a_group_trains(tmp_path: Path, group: str) -> None:
    options, states = GROUPS[group], rows_of("Options")
    assert all(states[name] in ("works", "no effect") for name in options)
    before = weights_of(seeded(tiny_opt))
    trainer = trained(tmp_path, **options)
    assert trainer.state.global_step > 0 and logged(trainer, "loss")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer.model).items())


REFUSED: dict[str, Any] = {
    "neftune_noise_alpha": 5.0,
    "activation_checkpointing": True,
    "gradient_checkpointing": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
}


def test_the_refused_options_are_refused_by_name(tmp_path: Path) -> None:
    names = {option.name for option in fields(TrainingArguments)}
    assert {name for name, state in rows_of("Options").items() if state == "refused"} == set(REFUSED)
    for name, value in REFUSED.items():
        if name in names:  # the two names of activation checkpointing are those of different versions
            with pytest.raises(ValueError, match=r"activation_checkpointing|gradient_checkpointing|" + name):
                config(tmp_path, **{name: value})
