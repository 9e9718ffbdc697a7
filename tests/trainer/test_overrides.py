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


class NamesGroups(Trainer):
    """Hands over the groups of `OwnOptimizer`, as sentence-transformers hands over its own."""

    key = "optimizer_dict"

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        still = [p for name, p in self.model.named_parameters() if "embed" in name]
        others = [p for name, p in self.model.named_parameters() if "embed" not in name]
        groups = [{"params": still, "lr": 0.0}, {"params": others}]
        return torch.optim.SGD, {"lr": args.learning_rate, self.key: groups}


@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_groups_of_a_subclass_hold_as_those_of_its_own_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(NamesGroups, "key", key)
    own, named = made(OwnOptimizer, tmp_path), made(NamesGroups, tmp_path, learning_rate=1e-2)
    for trainer in (own, named):
        trainer.train()
    assert_same_bits(weights_of(named.model), weights_of(own.model))
    assert named.get_learning_rates() == [0.0, 1e-2]


def test_groups_of_a_subclass_hold_for_all_weights_and_leave_out_what_they_do_not_name(tmp_path: Path) -> None:
    class Head(Trainer):
        def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
            return torch.optim.SGD, {
                "lr": args.learning_rate,
                "params": [self.model.model.decoder.layers[0].fc1.weight],
            }

    for kind, moves in ((NamesGroups, "layers"), (Head, "layers.0.fc1.weight")):
        before = weights_of(seeded(tiny_opt))
        trainer = made(kind, tmp_path, zo_subspace="full", learning_rate=1e-3)
        trainer.train()
        moved = [name for name, tensor in weights_of(trainer.model).items() if not torch.equal(tensor, before[name])]
        assert moved and all(moves in name or "final" in name for name in moved)
        assert len(moved) == 1 or kind is NamesGroups


class AdamWByName(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        return torch.optim.AdamW, {"lr": 1e-3}


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        (AdamWByName, "named by get_optimizer_cls_and_kwargs does not combine", {"zo_subspace": "full"}),
        (NamesGroups, "a parameter group with a learning rate of its own", {"learning_rate": "auto"}),
    ],
)
def test_groups_and_classes_are_refused_where_they_cannot_hold(
    tmp_path: Path, kind: type[Trainer], match: str, options: dict[str, Any]
) -> None:
    refused(kind, tmp_path, match, **options)


class HasWeights(Trainer):
    """Has a loss with a parameter of its own, which is not a part of the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss = nn.Linear(2, 1, bias=False)


class OptimizesThem(HasWeights):
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *self.loss.parameters()], lr=1e-3)
        return self.optimizer


class AddsThem(HasWeights):
    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        super().create_optimizer(*args, **kwargs)
        self.optimizer.add_param_group({"params": list(self.loss.parameters())})
        return self.optimizer


class NamesThem(HasWeights):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        both = [*self.model.parameters(), *self.loss.parameters()]
        return torch.optim.SGD, {"lr": 1e-3, "params": both}


@pytest.mark.parametrize(
    ("kind", "subspace"),
    [
        (OptimizesThem, "low_rank"),
        (AddsThem, "full"),
        (AddsThem, "low_rank"),
        (NamesThem, "full"),
        (NamesThem, "norms"),
    ],
)
def test_parameters_outside_of_the_model_are_refused_by_name(
    tmp_path: Path, kind: type[Trainer], subspace: str
) -> None:
    refused(kind, tmp_path, r"trains loss\.weight, which is not a parameter of the model", zo_subspace=subspace)


def test_frozen_parameters_outside_of_the_model_are_no_reason_to_refuse(tmp_path: Path) -> None:
    trainer = made(OptimizesThem, tmp_path, max_steps=1)
    trainer.loss.requires_grad_(False)
    trainer.train()


def test_a_users_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1e-3)
    with pytest.raises(ValueError, match=r"^optimizers=\.\.\. trains a tensor of shape \(3,\)"):
        trained(tmp_path, more={"optimizers": (other, None)})


def test_groups_that_are_added_after_super_are_refused(tmp_path: Path) -> None:
    class Adds(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            super().create_optimizer(*args, **kwargs)
            self.optimizer.add_param_group({"params": list(self.model.lm_head.parameters()), "lr": 1e-2})
            return self.optimizer

    refused(Adds, tmp_path, "make the whole optimizer from self.model")


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


class StepsTwice(Trainer):
    """Adds a second loss as adversarial training does."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs) + super().training_step(*args, **kwargs)


class Skips(Trainer):
    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.zeros(())


@pytest.mark.parametrize("kind", [Backpropagates, BackpropagatesByHand, Skips])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_the_engine_does_not_see_is_refused(
    tmp_path: Path, kind: type[Trainer], max_grad_norm: float
) -> None:
    refused(kind, tmp_path, r"training_step must return super\(\)\.training_step", max_grad_norm=max_grad_norm)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_second_estimate_of_a_step_is_refused(tmp_path: Path, micro_batches: int) -> None:
    refused(
        StepsTwice, tmp_path, r"calls super\(\)\.training_step\(\) again", gradient_accumulation_steps=micro_batches
    )


class Differentiates(Trainer):
    """Perturbs its embeddings along the sign of their gradient."""

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=inputs["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embeds)
        return model(inputs_embeds=embeds + 1e-2 * gradient.sign(), labels=inputs["labels"]).loss


class DifferentiatesWithGradients(Differentiates):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with torch.enable_grad():
            return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("kind", [Differentiates, DifferentiatesWithGradients])
def test_a_gradient_inside_of_the_loss_is_refused(tmp_path: Path, kind: type[Trainer]) -> None:
    refused(kind, tmp_path, "takes a gradient of the trained model")


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


# Weights and batches that a subclass loads in its own way.


class LoadsBest(Trainer):
    """Loads the best weights without a call of super(), as sentence-transformers does."""

    def _load_best_model(self) -> None:
        self.model.load_state_dict(type(self.model).from_pretrained(self.state.best_model_checkpoint).state_dict())


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_best_weights_that_a_subclass_loads_are_the_model_s(tmp_path: Path, subspace: str) -> None:
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options = every | {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "zo_fold_steps": None}
    trainer = made(LoadsBest, tmp_path, zo_subspace=subspace, learning_rate=1e-2, **options)
    trainer.train()
    best = tiny_opt().from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_bits(weights_of(trainer.model), weights_of(best))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


class FirstRows(Trainer):
    """Trains on a few rows of its own choice; the others have columns that its loss does not know."""

    def get_train_dataloader(self) -> Any:
        rows = [self.train_dataset[i] for i in range(4)]
        loader = torch.utils.data.DataLoader(rows, batch_size=2)
        return self.accelerator.prepare(loader)

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        assert len(inputs["labels"]) == 2 and set(inputs["labels"][:, -1].tolist()) == {5, 6}
        self.log({"part": 1.0})
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_a_search_draws_from_the_loader_of_a_subclass_and_logs_nothing_of_its_loss(tmp_path: Path) -> None:
    trainer = made(FirstRows, tmp_path, learning_rate="auto", max_steps=200)
    assert trainer.find_learning_rate().forward_passes > 2 and not logged(trainer, "part")
