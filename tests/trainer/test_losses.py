"""Every way a Trainer has to define a loss, and losses that are not numbers."""

from __future__ import annotations

import itertools
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.trainer.runs import Recorder, logged, make_trainer, trained, with_coordinates, with_lora
from zo_hf import ZOTrainer

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


class Penalty(ZOTrainer):
    """Minimizes the size of all weights, which it reads from the model's list of parameters."""

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = sum((p.double() ** 2).sum() for p in model.parameters() if p.requires_grad)
        return (loss, {}) if return_outputs else loss


class PenaltyOnAnOlderList(ZOTrainer):
    """Lists the parameters before there is a step."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.penalized = list(model.parameters())
        super().__init__(model, *args, **kwargs)

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = sum((p.double() ** 2).sum() for p in self.penalized)
        return (loss, {}) if return_outputs else loss


class PenaltyInItsOwnWay(Penalty):
    """Evaluates a batch as TRL's trainers do, without Trainer's method, and counts the batches in a buffer."""

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.model, "calls"):
            self.model.register_buffer("calls", torch.zeros(()))
        self.model.calls += 1
        return super().compute_loss(model, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize(
    ("subspace", "kind", "options"),
    [
        ("low_rank", Penalty, {}),
        ("full", Penalty, {}),
        ("low_rank", Penalty, COMPILED),
        ("low_rank", PenaltyOnAnOlderList, {}),
        ("full", PenaltyOnAnOlderList, {}),
        ("low_rank", PenaltyOnAnOlderList, COMPILED),
    ],
    ids=str,
)
def test_a_penalty_on_all_parameters_is_minimized(
    tmp_path: Path, subspace: str, kind: type[ZOTrainer], options: dict[str, Any]
) -> None:
    """An evaluation between folds has the present weights, as one after training does."""
    options = options | {"zo_subspace": subspace, "learning_rate": 1e-5, "max_steps": 20, "prediction_loss_only": True}
    trainer = make_trainer(tmp_path, kind=kind, eval_strategy="steps", eval_steps=20, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    (during,) = logged(trainer, "eval_loss")
    assert during < before - 0.05
    assert trainer.evaluate()["eval_loss"] == pytest.approx(during, rel=1e-6)


def test_a_subclass_that_evaluates_in_its_own_way_sees_the_present_weights_and_leaves_buffers(tmp_path: Path) -> None:
    every_20 = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 20}
    trainer = make_trainer(tmp_path, kind=PenaltyInItsOwnWay, learning_rate=1e-5, **every_20)
    trainer.evaluate()
    calls = trainer.model.calls.item()
    trainer.train()
    assert trainer.model.calls.item() == calls > 0
    (during,) = logged(trainer, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(during, rel=1e-6)


# Losses that are not numbers.


class BrokenLoss(ZOTrainer):
    """Gives `value` in place of one probe's loss in the third step."""

    value = float("nan")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls = itertools.count()  # from the evaluation before any probe; a number would count batches
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if not self.zo:  # an evaluation
            return loss
        return loss * 0 + self.value if next(self.calls) == 5 else loss


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
    options = {"zo_batched_probes": True, "zo_rows_per_direction": 0, "zo_fold_steps": 0, "max_steps": 3}
    trainer, notes = with_coordinates(tmp_path, model, **options)
    handle.remove()
    assert calls == [16] * 3
    assert notes.lengths[1] == 0 and notes.lengths[0] > 0 and notes.lengths[2] > 0
    assert logged(trainer, "zo/skipped_steps") == [0, 1, 1] and math.isnan(logged(trainer, "loss")[1])


def test_ligers_fused_loss_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward makes logits in evaluation mode, in which probes run, unless it is told to skip them."""
    skipped = []

    def forward(self: nn.Module, input_ids: Tensor, labels: Tensor, skip_logits: Any = None, **kwargs: Any) -> Any:
        skipped.append(skip_logits)
        outputs = type(self).forward(self, input_ids, labels=labels, **kwargs)
        outputs.logits = None if skip_logits else outputs.logits
        return outputs

    def patch(model: nn.Module, config: Any) -> None:
        model.forward = types.MethodType(forward, model)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", patch)
    trainer = make_trainer(tmp_path, max_steps=2, use_liger_kernel=True)
    trainer.train()
    options = {"zo_rows_per_direction": 0, "zo_direction": "rademacher"}  # which auto has taken before it saw the loss
    plain = trained(tmp_path, max_steps=2, zo_batched_probes=False, **options)
    assert skipped == [True] * 4
    assert logged(trainer, "zo/projected_grad") == pytest.approx(logged(plain, "zo/projected_grad"), rel=1e-3)
