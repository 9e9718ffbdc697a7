"""A direction for every group of rows: each group's number, unbiased estimates, and steps divided in any way."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertForSequenceClassification, BertForTokenClassification, PreTrainedModel

from tests.conftest import (
    TinyTask,
    assert_same_bits,
    causal_batch,
    seeded,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_t5,
    translation_batch,
    weights_of,
)
from tests.subspaces.helpers import loss_of, prepared, sgd
from tests.trainer.runs import InOrder, SaveAt, logged, make_trainer, with_lora
from zo_hf import RowLosses, ZOTrainer
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ESTIMATORS
from zo_hf.estimators.probe import Probe
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.trajectory import read_trajectory, replay

ROWS, EPS = 6, 1e-2


def bert(kind: type, **options: Any) -> nn.Module:
    config = tiny_bert(**options).config
    config.num_labels = 3
    return kind(config)


def with_labels(labels: Tensor) -> dict[str, Tensor]:
    return causal_batch(ROWS) | {"labels": labels}


def ragged() -> dict[str, Tensor]:
    """Another number of labels in every row."""
    batch = causal_batch(ROWS)
    batch["labels"] = torch.where(torch.arange(12) > torch.arange(ROWS)[:, None] + 2, batch["input_ids"], -100)
    return batch


MODELS = {
    "opt": (tiny_opt, causal_batch(ROWS)),
    "llama, ragged": (tiny_llama, ragged()),
    "gpt2": (tiny_gpt2, causal_batch(ROWS)),
    "mixtral": (tiny_mixtral, causal_batch(ROWS)),
    "classes": (partial(bert, BertForSequenceClassification), with_labels(torch.arange(ROWS) % 3)),
    "tokens": (partial(bert, BertForTokenClassification), with_labels(ragged()["labels"].clamp(max=2))),
    "t5": (partial(tiny_t5, num_layers=1), translation_batch(ROWS)),
    "bart": (tiny_bart, translation_batch(ROWS)),
}
SUBSPACES = ["low_rank", "core", "full", "norms", "adapter"]


def share_of(model: nn.Module, batch: dict[str, Tensor], rows: slice) -> Tensor:
    """The share of some rows in the batch's loss, a scalar, from a forward pass over them alone."""
    part = {name: tensor[rows] for name, tensor in batch.items()}
    return model(**part).loss.double() * label_share(model, part, batch)


def label_share(model: Any, part: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The share of some rows in the labels of the batch."""
    is_shifted = isinstance(model, PreTrainedModel) and model.loss_type == "ForCausalLM"
    counts = [(b["labels"][:, 1:] if is_shifted else b["labels"]).ne(-100).sum() for b in (part, batch)]
    return counts[0] / counts[1]


def numbers_of_rows_alone(zo: ZerothOrder, batch: dict[str, Tensor], groups: int) -> list[float]:
    """The projected gradients of groups of rows, each from forward passes over its rows alone."""
    size, numbers = len(batch["labels"]) // groups, []
    for group in range(groups):
        ends = []
        for scale in (EPS, -EPS):
            with torch.no_grad(), zo.subspace.at((Probe(group, scale),), zo._stream, zo.distribution):
                ends.append(share_of(zo.model, batch, slice(group * size, group * size + size)).item())
        numbers.append((ends[0] - ends[1]) / (2 * EPS))
    return numbers


@pytest.mark.parametrize("rows_per_direction", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_every_group_has_the_number_of_its_own_rows(name: str, subspace: str, rows_per_direction: int) -> None:
    build, batch = MODELS[name]
    model = seeded(build)
    zo = ZerothOrder(model, subspace, eps=EPS, seed=0, rows_per_direction=rows_per_direction)
    found = zo.estimate(loss_of(model, batch)).projected_gradients
    expected = numbers_of_rows_alone(zo, batch, {1: 6, 2: 3, 4: 1}[rows_per_direction])
    assert found == pytest.approx(expected, abs=2e-6 / EPS)
    assert zo.row_groups is not None and zo.row_groups.comes_apart
    assert zo.forward_passes == 2 + 3 + 2, "the probes, a look at the rows, and both probes in one pass"


@pytest.mark.parametrize("estimator", ["two_point", "one_sided"])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_several_directions_and_both_estimators(subspace: str, estimator: str) -> None:
    """The numbers are in the order of groups, then of directions, and the gradient is Σ c · z / q."""
    model = prepared(subspace, seeded(tiny_opt))
    options = {"num_directions": 2, "estimator": estimator, "rows_per_direction": 2}
    zo = ZerothOrder(model, subspace, eps=EPS, seed=0, **options)
    if subspace != "full":
        sgd(zo, 0.0)
    numbers = zo.estimate(loss_of(model, causal_batch(ROWS))).projected_gradients
    assert len(numbers) == 3 * 2
    if zo.subspace.coordinate_blocks is None:
        return
    (block,) = zo.subspace.coordinate_blocks
    expected = sum(c / 2 * block.direction(zo._stream(i), zo.distribution) for i, c in enumerate(numbers))
    for key, coordinate in zo.subspace.coordinates.items():
        assert coordinate.grad is not None
        torch.testing.assert_close(coordinate.grad, block.layout.view(expected, key))


# Steps that are divided in several ways.


OPTIONS = {"zo_rows_per_direction": 1, "max_steps": 4, "zo_fold_steps": 2, "zo_rank": 2, "zo_eps": 1e-2}


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_micro_batches_give_the_same_steps(tmp_path: Path, optim: str) -> None:
    found = []
    for rows, micro_batches in ((16, 1), (4, 4)):
        trainer = make_trainer(
            tmp_path / str(rows),
            kind=InOrder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=micro_batches,
            optim=optim,
            **OPTIONS,
        )
        trainer.train()
        found.append((logged(trainer, "zo/projected_grad"), weights_of(trainer.model)))
    (one, first), (four, second) = found
    assert one == pytest.approx(four, rel=1e-2, abs=1e-4)
    moved = max((first[name] - tensor).abs().max() for name, tensor in weights_of(seeded(tiny_opt)).items())
    apart = max((first[name] - tensor).abs().max() for name, tensor in second.items())
    assert apart < 0.02 * moved


@pytest.mark.parametrize("subspace", ["low_rank", "full", "adapter"])
def test_resume_and_replay_have_the_same_bits(tmp_path: Path, subspace: str) -> None:
    def build() -> nn.Module:
        return with_lora(seeded(tiny_opt)) if subspace == "adapter" else seeded(tiny_opt)

    options = OPTIONS | {"zo_subspace": subspace, "per_device_train_batch_size": 8}
    options |= {} if subspace == "low_rank" else {"zo_rank": None, "zo_fold_steps": None}
    whole = make_trainer(tmp_path, build(), more={"callbacks": [SaveAt(3)]}, **options)
    whole.train()
    assert_same_bits(weights_of(replay(build(), tmp_path)), weights_of(whole.model))
    resumed = make_trainer(tmp_path, build(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_a_last_batch_with_fewer_rows_moves_fewer_directions(tmp_path: Path) -> None:
    options = OPTIONS | {"per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, more={"train_dataset": TinyTask(19)}, **options)
    trainer.train()
    assert trainer.state.global_step == 3
    assert_same_bits(weights_of(replay(seeded(tiny_opt), tmp_path)), weights_of(trainer.model))


def test_a_function_of_outputs_and_labels_comes_apart(tmp_path: Path) -> None:
    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs["logits"][:, -2], labels[:, -1])

    def divided(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return (
            nn.functional.cross_entropy(outputs["logits"][:, -2], labels[:, -1], reduction="sum") / num_items_in_batch
        )

    found = [
        logged_run(tmp_path / str(number), more={"compute_loss_func": function}, **OPTIONS)
        for number, function in enumerate((None, mean, divided))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-2, abs=1e-3)


def logged_run(folder: Path, **options: Any) -> list[float]:
    trainer = make_trainer(folder, **options)
    trainer.train()
    assert trainer.found_learning_rate is None
    return logged(trainer, "zo/projected_grad")


# The choice that "auto" makes.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"zo_estimator": "one_sided"}, 1),
        ({"zo_estimator": "forward_gradient"}, 1),
        ({"zo_estimator": "second_difference"}, 1),
        ({"zo_rows_per_direction": 2}, 2),
        ({"zo_subspace": "norms"}, 1),
        ({"zo_subspace": "full", "learning_rate": 1e-4}, 0),
        ({"zo_estimator": "fzoo", "zo_num_directions": 2}, 0),
        ({"zo_estimator": "fzoo", "zo_num_directions": 2, "zo_rows_per_direction": 2}, 2),
        ({"zo_direction": "sphere"}, 0),
        ({"zo_direction": "layers"}, 0),
        ({"zo_stability_steps": 2}, 1),
        ({"zo_batched_probes": True}, 1),
    ],
)
def test_auto_takes_a_direction_for_every_row_where_the_method_allows_it(
    tmp_path: Path, options: dict[str, Any], expected: int
) -> None:
    model = seeded(tiny_opt, attn_implementation="eager")  # which forward_gradient needs
    options = {"max_steps": 1, "per_device_train_batch_size": 4} | options
    make_trainer(tmp_path, model, more={"callbacks": [SaveAt(1)]}, **options).train()
    settings = json.loads((tmp_path / "checkpoint-1" / "zo_state.json").read_text())["settings"]
    assert settings["zo_rows_per_direction"] == expected
    (record,) = read_trajectory(tmp_path).records
    kind = ESTIMATORS[options.get("zo_estimator", "two_point")]
    of_a_group = kind(1.0, options.get("zo_num_directions", 1)).numbers
    assert len(record.projected_gradients) == of_a_group * (4 // expected if expected else 1)


def test_auto_has_at_most_32_directions_for_a_batch() -> None:
    found = []
    for rows_per_direction in ("auto", 1):
        model = seeded(tiny_opt)
        zo = ZerothOrder(model, "norms", seed=0, rows_per_direction=rows_per_direction)
        found.append(len(zo.estimate(loss_of(model, causal_batch(48))).projected_gradients))
    assert found == [24, 48]


@pytest.mark.parametrize(
    ("rows_per_direction", "processes", "expected"),
    [("auto", 40, 24 * 40), ("auto", 64, 16 * 64), (1, 64, 48 * 64), ("auto", 1100, 1100)],
)
def test_auto_has_at_most_1024_directions_for_the_batches_of_all_processes(
    rows_per_direction: Any, processes: int, expected: int
) -> None:
    """Each process draws the directions of all."""
    ranks = Ranks(Grid(data=processes))
    zo = ZerothOrder(seeded(tiny_opt), "norms", rows_per_direction=rows_per_direction, ranks=ranks)
    assert zo.row_groups is not None
    zo.row_groups.expect(48, micro_batches=2)
    assert zo.row_groups.count == 2 * expected


@pytest.mark.parametrize("choice", [{"zo_rows_per_direction": 0}, {"zo_direction": "gaussian"}], ids=str)
def test_auto_goes_on_with_the_choice_of_the_checkpoint(tmp_path: Path, choice: dict[str, Any]) -> None:
    options = {"max_steps": 4, "per_device_train_batch_size": 4}
    whole = make_trainer(tmp_path, more={"callbacks": [SaveAt(2)]}, **options, **choice)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    with pytest.raises(ValueError, match=r"zo_rows_per_direction=. and this run has zo_rows_per_direction=2"):
        make_trainer(tmp_path, **options, zo_rows_per_direction=2).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


@pytest.mark.parametrize("value", ["most", -1, 1.5, True])
def test_other_values_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"zo_rows_per_direction=.* must be a whole number"):
        make_trainer(tmp_path, zo_rows_per_direction=value)


# Losses that do not come apart.


def test_a_closure_keeps_one_direction_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = seeded(tiny_opt), causal_batch(ROWS)
    zo = ZerothOrder(model, "low_rank", seed=0, rows_per_direction=1, batched=False)
    plain = ZerothOrder(seeded(tiny_opt), "low_rank", seed=0, batched=False)
    optimizer = sgd(zo, 0.0)
    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        for _ in range(3):
            estimate = zo.estimate(lambda: model(**batch).loss)
            optimizer.step()
    assert len(estimate.projected_gradients) == 1
    assert len([r for r in caplog.records if "all rows of a step share" in r.message]) == 1
    first = plain.estimate(lambda: plain.model(**batch).loss)
    assert len(first.projected_gradients) == 1


class Joins(nn.Module):
    """Classifies rows of tokens; it may join them without padding in between, as models for flash attention do."""

    def __init__(self, joins: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.norm = nn.Embedding(64, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.out, self.joins = nn.Linear(8, 4), joins

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        kept = mask.flatten().nonzero().flatten()
        x = torch.tanh(self.norm(self.body(x.flatten(0, 1)[kept] if self.joins else x)))
        if self.joins:
            x = x.new_zeros(mask.numel(), 8).index_copy(0, kept, x).view(*mask.shape, 8)
        return self.out((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def losses(self, lengths: list[int]) -> RowLosses:
        """The losses of rows of these lengths."""
        ids = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(sum(lengths)))
        mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).float()
        return RowLosses(cross_entropy(self(ids, mask), ids[:, 0] % 4, reduction="none"))


@pytest.mark.parametrize("subspace", ["low_rank", "full", "norms"])
def test_rows_of_unlike_length_that_a_model_joins_share_a_direction(
    subspace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens of the later batches can be divided by the number of rows, and some parts would have tokens of two rows."""
    found: list[list[tuple[float, ...]]] = []
    for joins in (False, True):
        model = Joins(joins)
        zo = ZerothOrder(model, subspace, eps=EPS, seed=0, rows_per_direction=1)
        optimizer, of_steps = sgd(zo, 0.0), []
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="zo_hf"):
            for lengths in ([6, 6, 6, 6], [2, 6, 5, 3], [1, 6, 2, 3]):
                estimate = zo.estimate(partial(model.losses, lengths))
                of_steps.append(estimate.projected_gradients)
                optimizer.step()
        found.append(of_steps)
    (whole, *_), (joined, *later) = found
    assert joined == pytest.approx(whole, rel=1e-3, abs=1e-4) and all(joined)
    assert all([bool(c) for c in of_step] == [True, False, False, False] for of_step in later)
    assert len([m for m in caplog.messages if "share its directions: a layer sees 16 tokens of 4 rows" in m]) == 1


@pytest.mark.parametrize("subspace", ["low_rank", "full", "norms"])
def test_rows_that_a_model_joins_come_apart_if_the_first_batch_does(
    subspace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As the patches of images of one size, beside longer rows of text; a resumed run knows their length."""
    found = []
    for joins in (False, True):
        zo = ZerothOrder(Joins(joins), subspace, eps=EPS, seed=0, rows_per_direction=1)
        optimizer = sgd(zo, 0.0)
        found.append(zo.estimate(partial(zo.model.losses, [4, 4, 4, 4])).projected_gradients)
        optimizer.step()
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4) and all(found[1])
    resumed = ZerothOrder(Joins(True), subspace, eps=EPS, seed=0, rows_per_direction=1)
    sgd(resumed, 0.0)
    resumed.load_state_dict(zo.state_dict())
    for engine in (zo, resumed):
        apart = engine.estimate(partial(engine.model.losses, [4, 4, 4, 4])).projected_gradients
        assert all(apart) and len(apart) == 4
        unlike = engine.estimate(partial(engine.model.losses, [1, 6, 2, 3])).projected_gradients
        assert [bool(c) for c in unlike] == [True, False, False, False]
    for lengths in ([2, 6, 5, 3], [4, 3, 5, 4], [5, 3, 4, 4]):
        other = ZerothOrder(Joins(True), subspace, eps=EPS, seed=0, rows_per_direction=1)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="zo_hf"):
            assert len(other.estimate(partial(other.model.losses, lengths)).projected_gradients) == 1
        assert "all rows of a step share its directions: " in caplog.text


def test_a_model_with_terms_of_its_own_keeps_one_direction() -> None:
    model = seeded(tiny_mixtral, output_router_logits=True, router_aux_loss_coef=0.1)
    zo = ZerothOrder(model, "low_rank", seed=0, rows_per_direction=1)
    estimate = zo.estimate(loss_of(model, causal_batch(ROWS)))
    assert len(estimate.projected_gradients) == 1
    with torch.no_grad():
        assert estimate.loss == pytest.approx(model(**causal_batch(ROWS)).loss.item(), rel=1e-3)


class Ragged(TinyTask):
    """As many labels in each row of the first batch, and one to four in the rows after it."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        count = 2 if index < 8 else 1 + index % 4
        row["labels"][-count:] = row["input_ids"][-count:]
        return row


def test_a_mean_over_labels_is_asked_in_every_batch_whether_it_is_that_of_its_rows(tmp_path: Path) -> None:
    """It is in the first batch only. A resumed run, which begins with another batch, ends with the same bits."""

    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

    def run(folder: str, **options: Any) -> ZOTrainer:
        more = {"compute_loss_func": mean, "train_dataset": Ragged(), "callbacks": [SaveAt(1)]}
        trainer = make_trainer(tmp_path / folder, kind=InOrder, more=more, **OPTIONS)
        trainer.train(**options)
        return trainer

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    numbers = [r.projected_gradients for r in read_trajectory(tmp_path / "whole").records]
    assert all(numbers[0]) and all(sum(c != 0 for c in of_step) == 1 for of_step in numbers[1:])
