"""Everything a Trainer user knows works: optimizers, schedules, losses, callbacks, data, search, the Hub."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import HPSearchBackend

from tests.conftest import LENGTH, TinyTask, assert_same_bits, seeded, tiny_llama, tiny_opt, weights_of
from tests.trainer.runs import (
    At,
    Recorder,
    SaveAt,
    config,
    logged,
    make_trainer,
    trained,
    with_coordinates,
    with_lora,
)
from zo_hf import ZerothOrder, ZOSeq2SeqTrainer, ZOTrainer, ZOTrainerMixin
from zo_hf.subspaces import LowRank

# Optimizers.

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"learning_rate": 1e-3},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1e-4},
    "adamw_torch": {"learning_rate": 1e-2},
    "adamw_torch_fused": {"learning_rate": 1e-2},
    "adafactor": {"learning_rate": 1e-2},
    "rmsprop": {"learning_rate": 1e-2},
    "adagrad": {"learning_rate": 3e-2},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_chosen_by_name_learns(tmp_path: Path, name: str) -> None:
    options = {"optim": name, "per_device_train_batch_size": 16, "max_steps": 60, "zo_fold_steps": 50}
    trainer = make_trainer(tmp_path, **options | OPTIMIZERS[name])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3


def optimizer_in_use(trainer: ZOTrainer) -> At:
    def look(state: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = kwargs["optimizer"]
        return getattr(optimizer, "optimizer", optimizer)

    note = At({1}, look)
    trainer.add_callback(note)
    return note


def test_optim_args_reach_the_optimizer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.9,nesterov=True")
    note = optimizer_in_use(trainer)
    trainer.train()
    assert type(note.results[0]) is torch.optim.SGD
    assert note.results[0].defaults["momentum"] == 0.9 and note.results[0].defaults["nesterov"]


def test_optimizer_cls_and_kwargs_is_used(tmp_path: Path) -> None:
    more = {"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 3e-3, "momentum_decay": 1e-3})}
    trainer = make_trainer(tmp_path, more=more)
    note = optimizer_in_use(trainer)
    before = weights_of(trainer.model)
    trainer.train()
    assert type(note.results[0]) is torch.optim.NAdam and note.results[0].defaults["momentum_decay"] == 1e-3
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer.model).items())


def test_a_users_muon_moves_its_matrices_and_nothing_else(tmp_path: Path) -> None:
    model = seeded(tiny_opt)
    chosen = {n: p for n, p in model.named_parameters() if n.endswith(("fc1.weight", "fc2.weight"))}
    optimizer = torch.optim.Muon(chosen.values(), lr=1e-2)
    before = weights_of(model)
    trainer = trained(tmp_path, model, more={"optimizers": (optimizer, None)})
    moved = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(chosen)
    assert trainer.optimizer is optimizer
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in chosen.values()]


def test_a_users_optimizer_equals_the_same_one_chosen_by_name(tmp_path: Path) -> None:
    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    users = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(users, lambda step: 1.0)
    trainer = make_trainer(tmp_path, model, more={"optimizers": (users, schedule)})
    trainer.train()
    trained(tmp_path, reference, optim="adamw_torch", learning_rate=1e-3)
    assert_same_bits(weights_of(model), weights_of(reference))


def test_a_users_scheduler_sets_the_learning_rate(tmp_path: Path) -> None:
    model = seeded(tiny_opt)
    users = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(users, lambda step: 0.5**step)
    trainer = trained(tmp_path, model, more={"optimizers": (users, schedule)})
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


# Learning rate, clipping, weight decay.

SCHEDULES = {
    "linear": ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    "cosine": (
        {"lr_scheduler_type": "cosine", "warmup_steps": 1},
        [0, *((1 + math.cos(math.pi * k / 5)) / 2 for k in range(5))],
    ),
    "warmup ratio": ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
    "constant": ({}, [1] * 6),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_the_schedule_sets_the_length_of_every_update(tmp_path: Path, name: str, subspace: str) -> None:
    options, factors = SCHEDULES[name]
    options = options | {"max_steps": 6, "learning_rate": 1e-3, "zo_fold_steps": 0, "zo_direction": "rademacher"}
    trainer, notes = with_coordinates(tmp_path, seeded(tiny_opt), zo_subspace=subspace, **options)
    expected = [1e-3 * f * norm for f, norm in zip(factors, logged(trainer, "grad_norm"), strict=True)]
    assert notes.lengths == pytest.approx(expected, rel=1e-3)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_max_grad_norm_bounds_the_update(tmp_path: Path, subspace: str) -> None:
    model = with_lora(seeded(tiny_opt)) if subspace == "adapter" else seeded(tiny_opt)
    # PEFT's B begins at zero, so that an adapter's first estimates are small.
    limit, rate = (1e-2, 1e-1) if subspace == "adapter" else (50.0, 1e-3)
    options = {"learning_rate": rate, "zo_fold_steps": 0, "zo_direction": "rademacher", "max_steps": 5}
    trainer, notes = with_coordinates(tmp_path, model, zo_subspace=subspace, max_grad_norm=limit, **options)
    norms = logged(trainer, "grad_norm")  # before clipping, as in the stock Trainer
    assert notes.lengths == pytest.approx([rate * min(norm, limit) for norm in norms], rel=2e-3)
    assert sum(norm > limit for norm in norms) >= 3


class Odd(PreTrainedModel):
    """Norms under names that do not say so, a decoy that does, and a matrix inside a norm."""

    config_class = PreTrainedConfig

    class ScaledRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(1, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.layernorm_embedding = nn.Embedding(100, 16)
        self.first = nn.LayerNorm(16)
        self.second = self.ScaledRMSNorm()
        self.third = nn.GroupNorm(2, 16)
        self.head = nn.Linear(16, 100)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Any = None) -> dict:
        x = self.second(self.first(self.layernorm_embedding(input_ids)))
        logits = self.head(self.third(x.flatten(0, 1)).view_as(x))
        return {"loss": nn.functional.cross_entropy(logits[:, -1], labels[:, -1]), "logits": logits}


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_weight_decay_spares_norms_and_biases_whatever_they_are_called(tmp_path: Path, subspace: str) -> None:
    _, notes = with_coordinates(tmp_path, Odd(), zo_subspace=subspace, weight_decay=0.1, max_steps=1)
    assert {name for name, decay in notes.decay.items() if decay} == {"layernorm_embedding.weight", "head.weight"}
    assert set(notes.decay) == {name for name, _ in Odd().named_parameters()}

    _, notes = with_coordinates(tmp_path, seeded(tiny_llama), zo_subspace=subspace, weight_decay=0.1, max_steps=1)
    spared = {name for name, decay in notes.decay.items() if not decay}
    assert spared == {name for name, p in seeded(tiny_llama).named_parameters() if p.ndim < 2}
    assert "model.norm.weight" in spared and "model.layers.0.input_layernorm.weight" in spared


@pytest.mark.parametrize(("subspace", "fold_steps"), [("low_rank", 3), ("low_rank", 0), ("full", 3)])
def test_weight_decay_shrinks_the_weights_themselves(tmp_path: Path, subspace: str, fold_steps: int) -> None:
    """With a loss that is the same everywhere, decay is all that moves them: across folds, and in the last part."""

    def flat(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return torch.tensor(1.0)

    model = seeded(tiny_opt)
    before = weights_of(model)
    options = {"weight_decay": 0.5, "learning_rate": 1e-2, "zo_fold_steps": fold_steps, "max_steps": 8}
    trained(tmp_path, model, more={"compute_loss_func": flat}, zo_subspace=subspace, **options)
    for name, p in model.named_parameters():
        factor = (1 - 1e-2 * 0.5) ** 8 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-5, atol=0)


# Gradient accumulation.


class Uneven(TinyTask):
    """Rows with one to four labels each."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        count = 1 + index % 4
        row["labels"][-count:] = row["input_ids"][-count:]
        return row


@pytest.mark.parametrize("data", [TinyTask, Uneven])
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_eight_micro_batches_of_one_are_one_batch_of_eight(
    tmp_path: Path, data: type[TinyTask], subspace: str
) -> None:
    more = {"train_dataset": data(64)}
    options = {"zo_subspace": subspace, "zo_eps": 1e-2, "learning_rate": 1e-4, "max_steps": 5}
    one = trained(tmp_path, seeded(tiny_opt), more=more, **options)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    eight = trained(tmp_path, seeded(tiny_opt), more=more, **options | parts)
    for key in ("loss", "zo/projected_grad"):
        assert logged(eight, key) == pytest.approx(logged(one, key), rel=2e-3, abs=1e-4), key
    for name, tensor in weights_of(one.model).items():
        torch.testing.assert_close(weights_of(eight.model)[name], tensor, rtol=0, atol=2e-6)


def test_the_last_step_of_an_epoch_takes_the_micro_batches_that_are_left(tmp_path: Path) -> None:
    """Ten rows by twos, three at a time: a step of six rows and one of four, each a mean over its own labels."""
    batches = Recorder()
    more = {"train_dataset": Uneven(10), "data_collator": batches}
    options = {"gradient_accumulation_steps": 3, "num_train_epochs": 1, "max_steps": -1, "zo_eps": 1e-2}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 1e-4, "zo_batched_probes": False}
    trainer = trained(tmp_path, more=more, **options)
    assert trainer.state.global_step == 2 and len(batches.batches) == 5

    model = seeded(tiny_opt)
    engine = ZerothOrder(model, LowRank(model, fold_steps=3, seed=42), eps=1e-2, batched=False, seed=42)
    optimizer = engine.prepare(torch.optim.SGD(engine.coordinates(), lr=1e-4))
    for step, some in enumerate((batches.batches[:3], batches.batches[3:])):
        whole = {key: torch.cat([batch[key] for batch in some]) for key in some[0]}
        estimate = engine.estimate(lambda whole=whole: model(**whole).loss)
        optimizer.step()
        assert logged(trainer, "zo/projected_grad")[step] == pytest.approx(estimate.projected_gradients[0], rel=2e-3)
        assert logged(trainer, "loss")[step] == pytest.approx(estimate.loss, rel=1e-5)
    assert logged(trainer, "zo/forward_passes") == [6, 10]


# Losses.


def sharp_opt() -> nn.Module:
    """A tiny OPT that is sure of its (wrong) predictions, so that different losses are far apart."""
    model = seeded(tiny_opt)
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.mul_(10)
        model.lm_head.weight[5:7].mul_(5)  # the tokens that are labels
    return model


def first_loss(tmp_path: Path, kind: type[ZOTrainer] = ZOTrainer, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss logged for the first step, so close to the starting point that it is the loss there, and its batch."""
    batches = Recorder()
    more = {"data_collator": batches} | options.pop("more", {})
    trainer = trained(tmp_path, sharp_opt(), kind, more, max_steps=1, zo_eps=1e-5, **options)
    return logged(trainer, "loss")[0], batches.batches[0]


@torch.no_grad()
def plain_outputs(batch: dict[str, Tensor]) -> Any:
    return sharp_opt()(**batch)


def test_label_smoothing_is_the_stock_one(tmp_path: Path) -> None:
    loss, batch = first_loss(tmp_path, label_smoothing_factor=0.3)
    outputs = plain_outputs(batch)
    expected = LabelSmoother(0.3)(outputs, batch["labels"], shift_labels=True).item()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert abs(outputs.loss.item() - expected) > 0.003 * expected


def test_compute_loss_func_is_the_loss(tmp_path: Path) -> None:
    def halved(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return 0.5 * total / num_items_in_batch

    loss, batch = first_loss(tmp_path, more={"compute_loss_func": halved})
    assert loss == pytest.approx(0.5 * plain_outputs(batch).loss.item(), rel=1e-4)


class Weighted(ZOTrainer):
    """As in the documentation of Trainer: takes the labels out and weighs the classes."""

    weights = torch.ones(100).index_fill(0, torch.tensor([5]), 3.0)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits[:, -2], labels[:, -1], weight=self.weights)
        return (loss, outputs) if return_outputs else loss


def test_a_subclass_may_take_the_labels_and_weigh_the_classes(tmp_path: Path) -> None:
    loss, batch = first_loss(tmp_path, Weighted)
    logits = plain_outputs(batch).logits[:, -2]
    expected = nn.functional.cross_entropy(logits, batch["labels"][:, -1], weight=Weighted.weights).item()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert abs(nn.functional.cross_entropy(logits, batch["labels"][:, -1]).item() - expected) > 0.003 * expected


def test_a_loss_that_is_not_scaled_for_accumulation_is_averaged(tmp_path: Path) -> None:
    class Unscaled(Weighted):
        weights = torch.ones(100)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    whole, _ = first_loss(tmp_path, Unscaled)
    parts, _ = first_loss(tmp_path, Unscaled, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert parts == pytest.approx(whole, rel=1e-4)


def test_a_custom_loss_learns(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 16, "max_steps": 60, "zo_normalize": True, "zo_fold_steps": 50}
    trainer = make_trainer(tmp_path, kind=Weighted, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


# Compilation, memory, best model.


@pytest.mark.slow
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_compiled_model_trains_as_an_eager_one(tmp_path: Path, subspace: str) -> None:
    options = {"max_steps": 6, "learning_rate": 1e-4, "zo_eps": 1e-2, "zo_subspace": subspace}
    eager = trained(tmp_path, seeded(tiny_opt), **options)
    compiled = trained(tmp_path, seeded(tiny_opt), torch_compile=True, **options)
    assert logged(compiled, "loss") == pytest.approx(logged(eager, "loss"), rel=1e-4)
    assert logged(compiled, "zo/projected_grad") == pytest.approx(logged(eager, "zo/projected_grad"), rel=1e-2)
    assert not any("forward" in module.__dict__ for module in compiled.model.modules())


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, subspace: str) -> None:
    """A learning rate that breaks the model after a good start, so that the best step is not the last."""

    class Grows(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 if state.global_step < 4 else 3.0

    model = with_lora(seeded(tiny_opt)) if subspace == "adapter" else seeded(tiny_opt)
    options = {"max_steps": 7, "zo_subspace": subspace, "save_strategy": "steps", "save_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "zo_normalize": True}
    trainer = trained(tmp_path, model, more={"callbacks": [Grows()]}, **options)
    losses = logged(trainer, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert best <= 5 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    # Between folds the low-rank part is added in another order: equal up to rounding.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert not any("forward" in module.__dict__ for module in model.modules())
    if subspace != "adapter":
        saved = type(model).from_pretrained(trainer.state.best_model_checkpoint)
        assert_same_bits(weights_of(model), weights_of(saved))


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_batch_that_does_not_fit_is_made_smaller_and_leaves_no_trace(tmp_path: Path, subspace: str) -> None:
    class Small(ZOTrainer):
        limit = 7

        def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return loss

    class Large(Small):
        limit = 1000

    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    trainer = trained(tmp_path, model, Small, zo_subspace=subspace, auto_find_batch_size=True)
    assert trainer._train_batch_size <= 7 and trainer.state.global_step == 4
    size = trainer._train_batch_size
    trained(tmp_path, reference, Large, zo_subspace=subspace, per_device_train_batch_size=size)
    assert_same_bits(weights_of(model), weights_of(reference))


# Callbacks, evaluation, search, subclasses.


class Reporter(TrainerCallback):
    """Stands for Weights & Biases, TensorBoard and the like: what it is sent in `on_log`, and the order of calls."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.calls: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("begin")

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("substep")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("pre")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("step")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("end")


def test_reporting_callbacks_get_the_zeroth_order_metrics(tmp_path: Path) -> None:
    reporter = Reporter()
    trained(tmp_path, more={"callbacks": [reporter]}, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    keys = {"loss", "grad_norm", "learning_rate", "zo/projected_grad", "zo/forward_passes", "zo/skipped_steps"}
    steps = [logs for logs in reporter.logs if "loss" in logs]
    assert len(steps) == 2 and all(keys <= set(logs) for logs in steps)
    assert all(isinstance(logs[key], float | int) for logs in steps for key in keys)
    assert reporter.calls == ["begin", "substep", "pre", "step", "end"] * 4


def test_a_callback_can_stop_the_training(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = trained(tmp_path, more={"callbacks": [Stops()]}, max_steps=9)
    assert trainer.state.global_step == 3 and trainer.zo is None


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_evaluating_and_predicting_on_the_way_sees_the_model_of_that_step_and_changes_nothing(
    tmp_path: Path, subspace: str
) -> None:
    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    look = At({2, 4}, lambda state, **kwargs: (trainer.predict(TinyTask(16)), trainer.evaluate()["eval_loss"]))
    options = {"zo_subspace": subspace, "learning_rate": 1e-3, "max_steps": 5}
    trainer = make_trainer(tmp_path, model, more={"callbacks": [look, SaveAt(2, 4)]}, **options)
    trainer.train()
    for step, (prediction, loss) in zip((2, 4), look.results, strict=True):
        again = make_trainer(tmp_path, type(model).from_pretrained(tmp_path / f"checkpoint-{step}"))
        expected = again.predict(TinyTask(16))
        torch.testing.assert_close(
            torch.from_numpy(prediction.predictions), torch.from_numpy(expected.predictions), rtol=1e-4, atol=1e-5
        )
        assert loss == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    trained(tmp_path, reference, **options)
    assert_same_bits(weights_of(model), weights_of(reference))


def test_model_init_starts_every_training_anew(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, more={"model_init": lambda: seeded(tiny_opt)})
    trainer.train()
    first = weights_of(trainer.model)
    trainer.train()
    assert_same_bits(weights_of(trainer.model), first)
    assert_same_bits(weights_of(trained(tmp_path, seeded(tiny_opt)).model), first)


class ScriptedSearch:
    """A search backend that tries what it is given, in the manner of transformers' one for Optuna."""

    learning_rates = (1e-7, 1e-3)

    def ensure_available(self) -> None:
        pass

    def default_hp_space(self, trial: Any) -> dict[str, Any]:
        return trial.params

    def run(self, trainer: ZOTrainer, n_trials: int, direction: str, **kwargs: Any) -> Any:
        objectives = {}
        for number, rate in enumerate(self.learning_rates[:n_trials]):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate, "zo_rank": 2}))
            objectives[rate] = trainer.evaluate()["eval_loss"]
            trainer.model_wrapped = trainer.model = None
            trainer.accelerator.clear()
        return min(objectives, key=objectives.get), objectives


def test_hyperparameter_search_trains_with_every_trials_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import trainer as module

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, ScriptedSearch)
    look = At({1}, lambda state, **kwargs: (trainer.args.learning_rate, trainer.zo.subspace.rank))
    options = {"max_steps": 30, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 30}
    more = {"model_init": lambda: seeded(tiny_opt), "callbacks": [look]}
    trainer = make_trainer(tmp_path, more=more, **options)
    best, objectives = trainer.hyperparameter_search(n_trials=2, backend="optuna")
    assert best == 1e-3 and objectives[1e-3] < objectives[1e-7] - 0.3
    assert look.results == [(1e-7, 2), (1e-3, 2)]
    for number in (0, 1):
        assert (tmp_path / f"run-{number}" / "checkpoint-30" / "zo_state.json").exists()


def test_hyperparameter_search_with_optuna(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path, more={"model_init": lambda: seeded(tiny_opt)}, **options)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)},
        n_trials=2,
        backend="optuna",
    )
    assert 1e-5 <= best.hyperparameters["learning_rate"] <= 1e-3 and best.objective > 0


def test_the_mixin_makes_another_trainer_forward_only(tmp_path: Path) -> None:
    class Mine(Trainer):
        """Has its own data loader and logs something more."""

        def get_train_dataloader(self) -> Any:
            self.asked_for_data = True
            return super().get_train_dataloader()

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs | {"mine": 1.0}, *args, **kwargs)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the optimizer must be that of the coordinates")

    class ZOMine(ZOTrainerMixin, Mine):
        pass

    model, reference = seeded(tiny_opt), seeded(tiny_opt)
    trainer = ZOMine(model, config(tmp_path), train_dataset=TinyTask())
    trainer.train()
    trained(tmp_path, reference)
    assert_same_bits(weights_of(model), weights_of(reference))
    assert trainer.asked_for_data and logged(trainer, "mine") and len(logged(trainer, "zo/forward_passes")) == 4


@pytest.mark.parametrize("kind", [ZOTrainer, ZOSeq2SeqTrainer])
def test_data_evaluation_and_the_loop_are_the_stock_ones(kind: type[ZOTrainer]) -> None:
    stock = kind.__mro__[kind.__mro__.index(ZOTrainerMixin) + 1]
    names = ["get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "get_batch_samples", "evaluate"]
    names += ["predict", "prediction_step", "evaluation_loop", "compute_loss", "create_scheduler", "push_to_hub"]
    names += ["create_model_card", "save_model", "hyperparameter_search", "_inner_training_loop", "_run_epoch"]
    for name in names:
        assert getattr(kind, name) is getattr(stock, name), name


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (TinyTask()[index] for index in range(20))


def test_an_iterable_dataset_is_read_again_until_max_steps(tmp_path: Path) -> None:
    trainer = trained(tmp_path, more={"train_dataset": Stream()}, max_steps=7)
    assert trainer.state.global_step == 7 and len(logged(trainer, "loss")) == 7


# Losses that are not numbers.


class BrokenLoss(ZOTrainer):
    """Gives `value` in place of one probe's loss in the third step."""

    value, calls = float("nan"), 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if not self.zo:  # an evaluation
            return loss
        self.calls += 1
        return loss * 0 + self.value if self.calls == 5 else loss


SUBSPACES_AND_OPTIMIZERS = [
    ("low_rank", "sgd"),
    ("low_rank", "adamw_torch"),
    ("full", "sgd"),
    ("adapter", "sgd"),
    ("adapter", "adamw_torch"),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("subspace", "optim"), SUBSPACES_AND_OPTIMIZERS)
def test_a_step_with_a_loss_that_is_no_number_is_skipped_counted_and_shown(
    tmp_path: Path, value: float, subspace: str, optim: str
) -> None:
    kind = type("Broken", (BrokenLoss,), {"value": value})
    model = with_lora(seeded(tiny_opt)) if subspace == "adapter" else seeded(tiny_opt)
    options = {"zo_subspace": subspace, "optim": optim, "weight_decay": 0.1, "zo_fold_steps": 0, "max_steps": 5}
    trainer, notes = with_coordinates(tmp_path, model, kind, learning_rate=1e-4, zo_normalize=True, **options)
    assert notes.lengths[2] == 0 and all(notes.lengths[step] > 0 for step in (0, 1, 3, 4))
    assert logged(trainer, "zo/skipped_steps") == [0, 0, 1, 1, 1]
    losses = logged(trainer, "loss")
    assert not math.isfinite(losses[2]) and all(math.isfinite(losses[step]) for step in (0, 1, 3, 4))
    assert all(tensor.isfinite().all() for tensor in weights_of(model).values())


def test_a_skipped_step_leaves_nothing_for_the_next_fold(tmp_path: Path) -> None:
    """Every loss is nan, and the weights that come out, decay included, are those that went in."""

    def broken(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return torch.tensor(float("nan"))

    for subspace in ("low_rank", "full"):
        model = seeded(tiny_opt)
        options = {"weight_decay": 0.5, "zo_fold_steps": 3, "zo_subspace": subspace}
        trainer = trained(tmp_path, model, more={"compute_loss_func": broken}, **options)
        assert logged(trainer, "zo/skipped_steps") == [1, 2, 3, 4]
        assert_same_bits(weights_of(model), weights_of(seeded(tiny_opt)))


def test_a_nan_in_one_micro_batch_skips_the_whole_step(tmp_path: Path) -> None:
    trainer, notes = with_coordinates(
        tmp_path, None, BrokenLoss, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=2
    )
    assert notes.lengths[0] == 0 and notes.lengths[1] > 0
    assert logged(trainer, "zo/skipped_steps") == [1, 1] and math.isnan(logged(trainer, "loss")[0])


def test_batched_probes_notice_a_nan_too(tmp_path: Path) -> None:
    model = seeded(tiny_opt)
    calls = []

    def break_second_step(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        calls.append(len(output))
        return output * float("nan") if len(calls) == 2 else None

    handle = model.lm_head.register_forward_hook(break_second_step)
    trainer, notes = with_coordinates(tmp_path, model, zo_batched_probes=True, zo_fold_steps=0, max_steps=3)
    handle.remove()
    assert calls == [16] * 3
    assert notes.lengths[1] == 0 and notes.lengths[0] > 0 and notes.lengths[2] > 0
    assert logged(trainer, "zo/skipped_steps") == [0, 1, 1] and math.isnan(logged(trainer, "loss")[1])


# The Hub.


def test_checkpoints_are_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    uploads = []

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self: HfApi, *, folder_path: str, run_as_future: bool = False, **kwargs: Any) -> Any:
        names = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")}
        uploads.append((kwargs["repo_id"], kwargs["commit_message"], kwargs.get("path_in_repo"), names))
        future: Future = Future()
        future.set_result(SimpleNamespace(repo_url="https://example.org"))
        return future if run_as_future else future.result()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path / "tiny", **options)
    trainer.push_to_hub(commit_message="End of training")
    messages = [message for _, message, _, _ in uploads]
    assert {repo for repo, _, _, _ in uploads} == {"someone/tiny"}
    assert "Training in progress, step 2" in messages and messages[-1] == "End of training"
    folders = {path: names for _, _, path, names in uploads if path}
    assert set(folders) == {"checkpoint-2", "checkpoint-4"}
    assert all({"model.safetensors", "trainer_state.json", "zo_state.json"} <= names for names in folders.values())
    assert {"README.md", "model.safetensors"} <= uploads[-1][3]


def test_the_model_card_is_written(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(language="en", license="apache-2.0", model_name="tiny", tags=["zeroth-order"])
    card = (tmp_path / "README.md").read_text()
    assert "zeroth-order" in card and "# tiny" in card and "learning_rate: 0.01" in card


def test_a_row_is_as_long_as_the_tests_assume() -> None:
    assert len(Uneven()[3]["input_ids"]) == LENGTH
    assert [int((Uneven()[index]["labels"] != -100).sum()) for index in range(4)] == [1, 2, 3, 4]
