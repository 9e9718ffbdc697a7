"""Optimizers, schedules, clipping, weight decay and accumulation mean what they mean to a Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conftest import LENGTH, TinyTask, assert_same_bits, seeded, tiny_llama, tiny_opt, weights_of
from tests.trainer.runs import At, Recorder, logged, make_trainer, trained, with_coordinates, with_lora
from zo_hf import ZerothOrder, ZOTrainer
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
    trainer = make_trainer(tmp_path, seeded(tiny_opt, num_hidden_layers=1), **options | OPTIMIZERS[name])
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


@pytest.mark.parametrize("form", ["iterator", "iterator in a group", "names"])
def test_optimizer_cls_and_kwargs_takes_groups_in_every_form_that_torch_takes(tmp_path: Path, form: str) -> None:
    model = seeded(tiny_opt)
    layer = model.model.decoder.layers[0].fc1
    groups: dict[str, Any] = {
        "iterator": layer.parameters(),
        "iterator in a group": [{"params": layer.parameters()}],
        "names": layer.named_parameters(),
    }
    chosen = torch.optim.SGD, {"lr": 1e-2, "params": groups[form]}
    before = weights_of(model)
    trained(tmp_path, model, more={"optimizer_cls_and_kwargs": chosen})
    moved = {name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"model.decoder.layers.0.fc1.{name}" for name in ("weight", "bias")}


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
    trainer, notes = with_coordinates(tmp_path, seeded(tiny_opt, num_hidden_layers=1), zo_subspace=subspace, **options)
    expected = [1e-3 * f * norm for f, norm in zip(factors, logged(trainer, "grad_norm"), strict=True)]
    assert notes.lengths == pytest.approx(expected, rel=1e-3)
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_max_grad_norm_bounds_the_update(tmp_path: Path, subspace: str) -> None:
    model = seeded(tiny_opt, num_hidden_layers=1)
    model = with_lora(model) if subspace == "adapter" else model
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

    model = seeded(tiny_opt, num_hidden_layers=1)
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


@pytest.mark.parametrize(("subspace", "data"), [("low_rank", TinyTask), ("low_rank", Uneven), ("full", Uneven)])
def test_eight_micro_batches_of_one_are_one_batch_of_eight(
    tmp_path: Path, data: type[TinyTask], subspace: str
) -> None:
    more = {"train_dataset": data(64)}
    options = {"zo_subspace": subspace, "zo_eps": 1e-2, "learning_rate": 1e-4, "max_steps": 5}
    one = trained(tmp_path, seeded(tiny_opt, num_hidden_layers=1), more=more, **options)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    eight = trained(tmp_path, seeded(tiny_opt, num_hidden_layers=1), more=more, **options | parts)
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
    trainer = trained(tmp_path, more=more, zo_rows_per_direction=0, **options)
    assert trainer.state.global_step == 2 and len(batches.batches) == 5

    model = seeded(tiny_opt)
    engine = ZerothOrder(model, LowRank(model, fold_steps=3, seed=42), eps=1e-2, batched_probes=False, seed=42)
    optimizer = engine.prepare(torch.optim.SGD(engine.coordinates(), lr=1e-4))
    for step, some in enumerate((batches.batches[:3], batches.batches[3:])):
        whole = {key: torch.cat([batch[key] for batch in some]) for key in some[0]}
        estimate = engine.estimate(lambda whole=whole: model(**whole).loss)
        optimizer.step()
        assert logged(trainer, "zo/projected_grad")[step] == pytest.approx(estimate.projected_gradients[0], rel=2e-3)
        assert logged(trainer, "loss")[step] == pytest.approx(estimate.loss, rel=1e-5)
    assert logged(trainer, "zo/forward_passes") == [6, 10]


def test_a_row_is_as_long_as_the_tests_assume() -> None:
    assert len(Uneven()[3]["input_ids"]) == LENGTH
    assert [int((Uneven()[index]["labels"] != -100).sum()) for index in range(4)] == [1, 2, 3, 4]
