"""Methods of Trainer that a subclass overrides: they take effect, or one sentence refuses them by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests.conftest import TinyTask, assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import config, logged, make_trainer, trained
from zo_hf import ZOTrainer, forward_only


def made(kind: type[Trainer], folder: Path, model: nn.Module | None = None, **options: Any) -> ZOTrainer:
    """A trainer of a subclass, forward-only."""
    made, _ = forward_only(kind, TrainingArguments)
    model = seeded(tiny_opt) if model is None else model
    return made(model, config(folder, **options), train_dataset=TinyTask(), eval_dataset=TinyTask(16))


def refused(kind: type[Trainer], folder: Path, match: str, **options: Any) -> None:
    """Training fails with a ValueError in one sentence, and no weight has moved."""
    model = seeded(tiny_opt)
    before = weights_of(model)
    with pytest.raises(ValueError, match=match) as error:
        made(kind, folder, model, **options).train()
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")
    assert_same_bits(weights_of(model), before)


# The optimizer.


class OwnOptimizer(Trainer):
    """Makes its optimizer from the model's parameters; the embeddings have a rate of 0."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        still = [p for name, p in self.model.named_parameters() if "embed" in name]
        others = [p for name, p in self.model.named_parameters() if "embed" not in name]
        self.optimizer = torch.optim.SGD([{"params": still, "lr": 0.0}, {"params": others, "lr": 1e-2}])
        return self.optimizer


def test_the_groups_of_a_subclass_s_own_optimizer_hold(tmp_path: Path) -> None:
    before = weights_of(seeded(tiny_opt))
    trainer = made(OwnOptimizer, tmp_path)
    trainer.train()
    moved = {name for name, tensor in weights_of(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved and not any("embed" in name or "lm_head" in name for name in moved)
    assert trainer.get_learning_rates() == [0.0, 1e-2]
    assert all(
        any(p is q for q in trainer.model.parameters()) for g in trainer.optimizer.param_groups for p in g["params"]
    )


def test_a_second_training_makes_it_anew(tmp_path: Path) -> None:
    trainer = made(OwnOptimizer, tmp_path)
    trainer.train()
    middle = weights_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(tensor, middle[name]) for name, tensor in weights_of(trainer.model).items())


def test_it_moves_as_the_same_optimizer_passed_to_the_trainer(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            return self.optimizer

    model = seeded(tiny_opt)
    passed = trained(tmp_path, model, more={"optimizers": (torch.optim.AdamW(model.parameters(), lr=1e-3), None)})
    own = made(Own, tmp_path)
    own.train()
    assert_same_bits(weights_of(own.model), weights_of(passed.model))


@pytest.mark.parametrize("options", [{"zo_subspace": "full"}, {"learning_rate": "auto"}], ids=str)
def test_it_is_refused_by_name_where_it_cannot_work(tmp_path: Path, options: dict[str, Any]) -> None:
    refused(OwnOptimizer, tmp_path, "create_optimizer", **options)


def test_an_override_that_makes_nothing_is_refused(tmp_path: Path) -> None:
    class Nothing(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            return None

    refused(Nothing, tmp_path, r"create_optimizer sets no self\.optimizer")


class ScheduleFree(torch.optim.SGD):
    """Has the two methods by which Trainer recognizes a schedule-free optimizer."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


class MakesScheduleFree(Trainer):
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.optimizer = ScheduleFree(self.model.parameters(), lr=1e-3)
        return self.optimizer


class NamesScheduleFree(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        return ScheduleFree, {"lr": 1e-3}


@pytest.mark.parametrize("kind", [MakesScheduleFree, NamesScheduleFree])
def test_a_schedule_free_optimizer_of_a_subclass_is_refused(tmp_path: Path, kind: type[Trainer]) -> None:
    refused(kind, tmp_path, "schedule-free")


@pytest.mark.parametrize(
    "argument",
    [
        lambda model: {"optimizers": (ScheduleFree(model.parameters(), lr=1e-3), None)},
        lambda model: {"optimizer_cls_and_kwargs": (ScheduleFree, {"lr": 1e-3})},
    ],
    ids=["optimizers", "optimizer_cls_and_kwargs"],
)
def test_a_schedule_free_optimizer_is_refused_by_every_argument(tmp_path: Path, argument: Callable) -> None:
    model = seeded(tiny_opt)
    with pytest.raises(ValueError, match="a schedule-free optimizer does not combine"):
        make_trainer(tmp_path, model, more=argument(model))


def test_the_parameters_that_decay_are_the_subclass_s(tmp_path: Path) -> None:
    class NothingDecays(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return []

    class OneDecays(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters() if name.endswith("layers.0.fc1.weight")]

    decayed = {"weight_decay": 0.5, "max_steps": 1}
    runs = [made(kind, tmp_path, **decayed) for kind in (NothingDecays, OneDecays)]
    for trainer in runs:
        trainer.train()
    runs += [trained(tmp_path, max_steps=1), trained(tmp_path, **decayed)]
    none, one, plain, usual = (weights_of(trainer.model) for trainer in runs)
    assert_same_bits(none, plain)
    differ = [name for name in plain if not torch.equal(one[name], plain[name])]
    assert [name.rpartition("layers.")[2] for name in differ] == ["0.fc1.weight"]
    assert torch.equal(one[differ[0]], usual[differ[0]])


# The contexts of the loss.


class InContext(Trainer):
    """Counts the contexts of its losses, and computes them in bfloat16."""

    entered = 0

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        InContext.entered += 1
        return torch.autocast("cpu", dtype=torch.bfloat16)


def test_every_probe_runs_in_the_contexts_of_the_subclass(tmp_path: Path) -> None:
    InContext.entered = 0
    trainer = made(InContext, tmp_path, max_steps=2)
    trainer.train()
    assert InContext.entered >= logged(trainer, "zo/forward_passes")[-1] == 4
    plain = trained(tmp_path, max_steps=2, zo_batched_probes=False)
    assert 0 < abs(logged(trainer, "loss")[0] - logged(plain, "loss")[0]) < 0.1  # bfloat16 rounds


def test_a_context_around_the_loss_is_entered_and_left(tmp_path: Path) -> None:
    open_now: list[int] = []

    class Opens(Trainer):
        def compute_loss_context_manager(self) -> Any:
            stack = super().compute_loss_context_manager()
            open_now.append(1)
            stack.callback(open_now.pop)
            return stack

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            assert open_now
            return super().compute_loss(*args, **kwargs)

    made(Opens, tmp_path, max_steps=2).train()
    assert not open_now


def test_the_cache_is_emptied_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("zo_hf.trainer.trainer.clear_device_cache", lambda: calls.append(1))
    trained(tmp_path, max_steps=4, torch_empty_cache_steps=2)
    assert len(calls) == 2


# The step.


class Backpropagates(Trainer):
    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class BackpropagatesByHand(Trainer):
    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()


class Skips(Trainer):
    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.zeros(())


@pytest.mark.parametrize("kind", [Backpropagates, BackpropagatesByHand, Skips])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_the_engine_does_not_see_is_refused(
    tmp_path: Path, kind: type[Trainer], max_grad_norm: float
) -> None:
    refused(kind, tmp_path, r"training_step must return super\(\)\.training_step", max_grad_norm=max_grad_norm)


def test_backward_is_the_accelerator_s_again_after_training(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, {name: t[None] for name, t in TinyTask()[0].items()})
    trainer.accelerator.backward(loss)
    assert any(p.grad is not None for p in trainer.model.parameters())


def test_an_own_loop_over_the_hooks_trains(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = weights_of(trainer.model)
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    trainer.current_gradient_accumulation_steps = 1
    for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False):
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    trainer._finish_zeroth_order()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer.model).items())


def test_a_model_given_by_name_reaches_a_subclass_that_loads_it(tmp_path: Path) -> None:
    seeded(tiny_opt).save_pretrained(tmp_path / "model")

    class Loads(Trainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            from transformers import AutoModelForCausalLM

            super().__init__(AutoModelForCausalLM.from_pretrained(model), *args, **kwargs)

    kind, _ = forward_only(Loads, TrainingArguments)
    trainer = kind(str(tmp_path / "model"), config(tmp_path), train_dataset=TinyTask())
    trainer.train()
    reference = trained(tmp_path)
    assert_same_bits(weights_of(trainer.model), weights_of(reference.model))


def test_a_frozen_model_is_refused_in_words_about_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all parameters of OPTForCausalLM are frozen; set requires_grad"):
        make_trainer(tmp_path, seeded(tiny_opt).requires_grad_(False)).train()
    with pytest.raises(ValueError, match=r"all parameters of OPTForCausalLM are frozen"):
        more = {"model_init": lambda: seeded(tiny_opt).requires_grad_(False)}
        make_trainer(tmp_path, None, more=more).train()


def test_contexts_of_transformers_are_no_overrides(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert isinstance(trainer.compute_loss_context_manager(), contextlib.ExitStack)
    trainer.train()
    assert trainer.zo is None and logged(trainer, "loss")
