"""A subclass's loss is called at every probe as if once: its mode and its side effects."""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.conftest import TinyTask, seeded, tiny_opt, weights_of
from tests.trainer.runs import config, logged
from zo_hf import ZOTrainer, forward_only
from zo_hf.trainer import loss_state
from zo_hf.trainer.loss_state import LentBatches
from zo_hf.trainer.root_mode import RootMode
from zo_hf.trainer.side_effects import MOST_ENTRIES, Snapshot
from zo_hf.trainer.stop_gradient import StopGradients


def made(kind: type[Trainer], folder: Path, model: nn.Module | None = None, **options: Any) -> ZOTrainer:
    made, _ = forward_only(kind, TrainingArguments)
    more = {key: options.pop(key) for key in ("callbacks",) if key in options}
    model = seeded(tiny_opt) if model is None else model
    return made(model, config(folder, **options), train_dataset=TinyTask(), eval_dataset=TinyTask(16), **more)


# The mode.


class Metrics(Trainer):
    """Files metrics as TRL does: by the mode of the model, averaged when they are logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.rows = 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        mode = "train" if self.model.training else "eval"
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        assert not any(child.training for child in self.model.modules() if child is not self.model)
        self.metrics[mode]["calls"].append(1.0)
        if mode == "train":
            self.rows += len(inputs["input_ids"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        logs |= {f"{prefix}{key}": sum(values) for key, values in self.metrics[mode].items()}
        self.metrics[mode].clear()
        super().log(logs | {"rows": self.rows}, *args, **kwargs)


def test_metrics_are_a_training_s_and_counted_once_a_micro_batch(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "zo_num_directions": 3}
    trainer = made(Metrics, tmp_path, **options, eval_strategy="steps", eval_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["calls"] for line in lines] == [2.0] * 4 and not any("eval_calls" in line for line in lines)
    assert [line["rows"] for line in lines] == [8, 16, 24, 32]
    assert logged(trainer, "eval_calls") == [2.0, 2.0]  # 16 rows in batches of 8
    assert not trainer.model.training


def test_a_search_for_the_learning_rate_leaves_no_metrics(tmp_path: Path) -> None:
    trainer = made(Metrics, tmp_path, learning_rate="auto", max_steps=40, logging_steps=40)
    trainer.train()
    assert logged(trainer, "calls") == [40.0] and trainer.rows == 40 * 8


def test_what_a_loss_logs_is_logged_once_a_micro_batch(tmp_path: Path) -> None:
    class LogsParts(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            self.log({"part": loss.item()})
            return loss

    trainer = made(LogsParts, tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer.train()
    assert len(logged(trainer, "part")) == 6 and len(logged(trainer, "loss")) == 3


class OwnDropout(nn.Module):
    """A root whose own forward drops units while its flag says that it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = seeded(tiny_opt)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not self.training
        logits = F.dropout(self.inner(input_ids=input_ids).logits, 0.5, self.training)
        return {"loss": F.cross_entropy(logits[:, -2], labels[:, -1]), "logits": logits}


def test_the_root_s_own_forward_is_in_evaluation_mode(tmp_path: Path) -> None:
    trainer = made(Metrics, tmp_path, OwnDropout(), logging_steps=1)
    trainer.train()
    assert logged(trainer, "calls") == [1.0] * 4


class CallsTrain(TrainerCallback):
    """Leaves the model in training mode, as a callback that generates text does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].eval()
        kwargs["model"].train()


def test_a_callback_that_calls_train_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [CallsTrain()]):
        trainer = made(Metrics, tmp_path, seeded(tiny_opt, dropout=0.3), callbacks=callbacks)
        trainer.train()
        runs.append(weights_of(trainer.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_an_exception_in_the_forward_restores_the_flag() -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    model, mode = Fails(2, 2), RootMode()
    mode.enter(model, model)
    with pytest.raises(RuntimeError, match="no"), StopGradients():
        model(torch.zeros(1, 2))
    assert model.training
    mode.leave()
    assert not model.training and not model._forward_hooks and not model._forward_pre_hooks


# Side effects.


def test_a_snapshot_restores_numbers_and_containers_in_place() -> None:
    meter = SimpleNamespace(sum=1.0, values=[1])
    type(meter).__module__  # noqa: B018  # a plain object of another package
    owner = SimpleNamespace(
        count=3,
        by_mode={"train": defaultdict(list, a=[1.0])},
        last=deque([1], maxlen=2),
        seen={1},
        total=torch.ones(2),
    )
    train, last, total = owner.by_mode["train"], owner.last, owner.total
    snapshot = Snapshot(owner)
    owner.count += 1
    train["a"].append(2.0)
    train["b"].append(2.0)
    last.extend([2, 3])
    owner.seen.add(2)
    total += 1
    owner.new = 1
    snapshot.restore()
    assert (owner.count, dict(train), list(last), owner.seen) == (3, {"a": [1.0]}, [1], {1})
    assert owner.by_mode["train"] is train and owner.last is last and owner.total is total
    assert torch.equal(total, torch.ones(2)) and not hasattr(owner, "new")


class Meter:
    """A metric object of the user's."""

    def __init__(self) -> None:
        self.sum, self.values = 0.0, [0.0]


def test_a_snapshot_restores_plain_objects_and_long_lists() -> None:
    owner = SimpleNamespace(meter=Meter(), history=[0.0] * (MOST_ENTRIES + 1))
    snapshot = Snapshot(owner)
    owner.meter.sum += 1
    owner.meter.values.append(1.0)
    owner.history.append(1.0)
    snapshot.restore()
    assert owner.meter.sum == 0.0 and owner.meter.values == [0.0] and len(owner.history) == MOST_ENTRIES + 1


def test_a_long_list_keeps_what_the_first_evaluation_has_appended() -> None:
    owner = SimpleNamespace(history=[0.0] * (MOST_ENTRIES + 1))
    before = Snapshot(owner)
    owner.history.append(1.0)
    after = Snapshot(owner, earlier=before)
    before.restore()
    assert len(owner.history) == MOST_ENTRIES + 1
    owner.history.append(2.0)
    after.restore()
    assert owner.history[MOST_ENTRIES:] == [0.0, 1.0]


# State that the loss reads and changes.


class Table(nn.Module):
    """Classes of rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CountsInForward(Table):
    calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        outputs = super().forward(x, labels)
        return outputs | {"loss": outputs["loss"] + self.calls * outputs["logits"].square().mean()}


class KeepsInForward(Table):
    """Containers within containers hold its count, and the tensors of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"inner": ({"calls": [0]},)}
        self.last = {"logits": torch.zeros(8, 3)}

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        calls = self.kept["inner"][0]["calls"]
        calls[0] += 1
        outputs = super().forward(x, labels)
        self.last["logits"] = outputs["logits"]
        return outputs | {"loss": outputs["loss"] + calls[0] * outputs["logits"].square().mean()}


class KeepsATuple(Table):
    def __init__(self) -> None:
        super().__init__()
        self.kept = (0,)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.kept = (self.kept[0] + 1,)
        outputs = super().forward(x, labels)
        return outputs | {"loss": outputs["loss"] + self.kept[0] * outputs["logits"].square().mean()}


class Counts(Trainer):
    """The weight of a penalty grows with the calls."""

    calls = 0

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        self.calls += 1
        outputs = model(**inputs)
        return outputs["loss"] + self.calls * outputs["logits"].square().mean()


class WritesItsBatch(Trainer):
    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs["x"] += 1.0
        return model(**inputs)["loss"]


class WritesItsBatchLater(Trainer):
    """Writes labels of the second step on, as a mask that few batches need."""

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = model(**inputs)["loss"]
        if self.state.global_step:
            inputs["x"][inputs["x"] > 0] = 3.0
            loss = loss + 100 * model(**inputs)["logits"].square().mean()
        return loss


class TakesApart(Trainer):
    """Its batch is a dictionary within a dictionary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        flat = self.data_collator
        self.data_collator = lambda rows: {"inner": flat(rows)}

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs["inner"].pop("labels")
        return F.cross_entropy(model.layers(inputs["inner"]["x"]), labels)


class Queue(Trainer):
    """MoCo's: the logits of earlier batches are negatives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue, self.place = torch.zeros(64, 3), 0

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"] + (outputs["logits"] @ self.queue.clone().T).logsumexp(-1).mean()
        self.queue[self.place : self.place + 8] = 3 * outputs["logits"].detach()
        self.place += 8
        return loss


class Teacher(Trainer):
    """BYOL's: the teacher follows the student in the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = Table().requires_grad_(False)
        for parameter in self.teacher.parameters():
            parameter.mul_(3.0)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        with torch.no_grad():
            wanted = self.teacher(**inputs)["logits"]
            for mine, other in zip(self.teacher.parameters(), model.parameters(), strict=True):
                mine.mul_(0.9).add_(other, alpha=0.1)
        outputs = model(**inputs)
        return outputs["loss"] + (outputs["logits"] - wanted).square().mean()


def rows_of_numbers() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(x)]


def table_trainer(kind: type[Trainer], folder: Path, model: nn.Module | None = None, **options: Any) -> ZOTrainer:
    made, _ = forward_only(kind, TrainingArguments)
    options = {"max_steps": 3, "learning_rate": 1e-9, "remove_unused_columns": False, "zo_rank": 2} | options
    return made(Table() if model is None else model, config(folder, **options), train_dataset=rows_of_numbers())


def test_every_probe_begins_with_the_state_from_before_the_batch(tmp_path: Path) -> None:
    """Otherwise c is the difference of two states over 2 eps, here in the hundreds."""
    late = (Queue, Teacher)  # what they write is large, and known after the first evaluation of the run
    for kind, model in [(kind, Table) for kind in (Counts, WritesItsBatch, TakesApart, *late)] + [
        (Trainer, kept) for kept in (CountsInForward, KeepsInForward, KeepsATuple)
    ]:
        stock = TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=1e-9, remove_unused_columns=False, logging_steps=1, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        expected = kind(model(), stock, train_dataset=rows_of_numbers())
        expected.train()
        trainer = table_trainer(kind, tmp_path, model(), zo_eps=1e-4)
        trainer.train()
        first = kind in late
        assert logged(trainer, "loss")[first:] == pytest.approx(logged(expected, "loss")[first:], rel=1e-4)
        assert max(map(abs, logged(trainer, "zo/projected_grad"))) < 20, kind


class NewTeacher(Teacher):
    """Its teacher and another tensor that its loss writes are new in every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[ref] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.teacher, self.total = Table().requires_grad_(False), torch.zeros(100)
        self.given += map(ref, (self.teacher, self.total))
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.total += 1
        return super().compute_loss(*args, **kwargs)


def test_what_a_loss_no_longer_reads_is_not_kept(tmp_path: Path) -> None:
    trainer = table_trainer(NewTeacher, tmp_path)
    trainer.train()
    gc.collect()
    assert [given() is not None for given in trainer.given] == [False] * 4 + [True] * 2


def test_a_large_tensor_that_a_loss_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_state, "MOST_ELEMENTS", 100)
    with pytest.raises(ValueError, match=r"^compute_loss of \w*Queue writes a tensor of 192 elements, [^.]*\.$"):
        table_trainer(Queue, tmp_path).train()


def test_a_batch_that_is_written_after_the_first_step_is_the_same_at_every_probe(tmp_path: Path) -> None:
    trainer = table_trainer(WritesItsBatchLater, tmp_path, zo_eps=1e-4, max_steps=4)
    trainer.train()
    assert max(map(abs, logged(trainer, "zo/projected_grad"))) < 500
    assert logged(trainer, "loss")[2] == pytest.approx(logged(trainer, "loss")[3], rel=1e-3)


def test_a_batch_that_some_probes_write_is_refused() -> None:
    batches, batch = LentBatches(), {"x": torch.ones(2), "y": [torch.ones(2)]}
    with batches.lent(batch) as lent:
        assert lent["x"] is batch["x"] and lent["y"] is not batch["y"]
    with (
        pytest.raises(
            ValueError,
            match=r"^the loss writes into a tensor of its batch at some probes only, [^.]*inputs\['input_ids'\]",
        ),
        batches.lent(batch) as lent,
    ):
        lent["y"][0] += 1


def test_names_of_one_tensor_stay_of_one_tensor() -> None:
    tensor = torch.ones(2)
    with LentBatches().lent({"input_ids": tensor, "labels": tensor}) as lent:
        assert lent["input_ids"] is lent["labels"]
