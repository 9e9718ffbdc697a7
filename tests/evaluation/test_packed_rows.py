"""Directions for sequences that are packed end to end: a sequence is a row, whatever row of the batch it lies in."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from tests.conftest import (
    TinyTask,
    assert_same_bits,
    seeded,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    weights_of,
)
from tests.parallel.launch import run
from tests.subspaces.helpers import loss_of, prepared
from tests.trainer.runs import InOrder, SaveAt, logged, make_trainer
from zo_hf import ZOTrainer
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable, Probe
from zo_hf.evaluation.packed_loss import sequences_of
from zo_hf.subspaces.packing import Packing
from zo_hf.trajectory import read_trajectory, replay

EPS = 1e-2
LENGTHS = (5, 9, 3, 7, 4)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}


def sentences(lengths: tuple[int, ...] = LENGTHS, labels: int = 100) -> list[dict[str, list[int]]]:
    """Random sequences, with labels at the last positions of each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(7, 50, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length - labels) + ids[-labels:]})
    return found


def flat(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The sequences in one row; a cache would make transformers' masks overlook where they begin."""
    batch = DataCollatorWithFlattening()(rows)
    return {**batch, "use_cache": False}


def in_two_rows() -> dict[str, Any]:
    """Three sequences in the first row, and two with padding in the second; of all rows, the first has most labels."""
    first, second = flat(sentences()[:3]), flat(sentences()[3:])
    batch: dict[str, Any] = {"use_cache": False}
    for name, padding in (("input_ids", 1), ("position_ids", 0), ("labels", -100)):
        missing = first[name].shape[1] - second[name].shape[1]
        batch[name] = torch.cat([first[name], nn.functional.pad(second[name], (0, missing), value=padding)])
    return batch


def share_alone(model: nn.Module, rows: list[dict[str, list[int]]], row: dict[str, list[int]]) -> Tensor:
    """The share of one sequence in the loss of all, a scalar, from a forward pass over it alone."""
    counts = [sum(label != -100 for label in r["labels"][1:]) for r in (row, *rows)]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    return model(input_ids=ids, labels=labels).loss.double() * counts[0] / sum(counts[1:])


def numbers_alone(
    zo: ZerothOrder, rows: list[dict[str, list[int]]], group_of: list[int], eps: float = EPS
) -> list[float]:
    numbers = []
    for group in range(max(group_of) + 1):
        ends = []
        for scale in (eps, -eps):
            with torch.no_grad(), zo.subspace.at((Probe(group, scale),), zo._stream, zo.distribution):
                own = [row for row, of in zip(rows, group_of, strict=True) if of == group]
                ends.append(sum(share_alone(zo.model, rows, row).item() for row in own))
        numbers.append((ends[0] - ends[1]) / (2 * eps))
    return numbers


@pytest.mark.parametrize(
    ("rows_per_direction", "group_of"), [(1, [0, 1, 2, 3, 4]), (2, [0, 0, 0, 1, 1])], ids=["one each", "pairs"]
)
@pytest.mark.parametrize("subspace", ["low_rank", "core", "full", "norms", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_every_group_has_the_number_of_its_own_sequences(
    name: str, subspace: str, rows_per_direction: int, group_of: list[int]
) -> None:
    model = prepared(subspace, seeded(MODELS[name]))
    zo = ZerothOrder(model, subspace, eps=EPS, seed=0, rows_per_direction=rows_per_direction)
    found = zo.estimate(loss_of(model, flat(sentences()))).projected_gradients
    assert found == pytest.approx(numbers_alone(zo, sentences(), group_of), abs=2e-6 / EPS)
    assert zo.row_groups is not None and zo.row_groups.comes_apart and zo.forward_passes == 2 + 3


@pytest.mark.parametrize(
    "make", [in_two_rows, partial(flat, sentences(labels=1)), lambda: flat(sentences()) | {"position_ids": None}]
)
@pytest.mark.parametrize("estimator", ["two_point", "forward_gradient"])
def test_rows_padding_and_labels_anywhere(make: Any, estimator: str) -> None:
    """Several rows, padding that begins anew at every position, logits at labels alone, and lengths in place of positions."""
    batch = make()
    if batch["position_ids"] is None:  # then only an attention that takes lengths keeps sequences apart
        batch = {**flat(sentences()), "cu_seq_lens_q": torch.tensor([0, 5, 14, 17, 24, 28])}
        expected_of = batch.pop("position_ids")
        assert sequences_of(batch).equal(sequences_of({**batch, "position_ids": expected_of}))
        batch["position_ids"] = expected_of
    rows = sentences(labels=1) if int((batch["labels"] != -100).sum()) == 5 else sentences()
    model = seeded(tiny_llama, dtype=torch.float64, attn_implementation="eager")
    zo = ZerothOrder(model, "low_rank", eps=1e-5, seed=0, rows_per_direction=1, estimator=estimator)
    found = zo.estimate(loss_of(model, batch)).projected_gradients
    assert found == pytest.approx(numbers_alone(zo, rows, [0, 1, 2, 3, 4], 1e-5), abs=2e-2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [[0, 0, 1, 1, 1, 2]]),
        ({"attention_mask": torch.ones(1, 6)}, None),
        ({"position_ids": torch.arange(6)[None]}, None),
        # Two positions without a label at the end, and a first sequence without one.
        ({"labels": torch.tensor([[-100, 8, -100, 8, 8, -100]])}, [[0, 0, 1, 1, 1, 1]]),
        ({"labels": torch.tensor([[-100, -100, -100, 8, 8, 8]])}, [[0, 0, 0, 0, 0, 0]]),
        ({"position_ids": None, "cu_seq_lens_q": torch.tensor([0, 4, 6])}, [[0, 0, 0, 0, 1, 1]]),
    ],
)
def test_where_sequences_begin(change: dict[str, Any], expected: list[list[int]] | None) -> None:
    inputs = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]), "labels": torch.tensor([[-100, 8, -100, 8, 8, 8]])}
    if not change:  # the last sequence then has a label of its own
        inputs = {name: torch.cat([t, t[:, 1:2]], 1) for name, t in inputs.items()}
        expected = [[*expected[0], 2]] if expected else None
    found = sequences_of(inputs | change)
    assert (found if found is None else found.tolist()) == expected


def test_a_module_that_hides_its_positions_is_named() -> None:
    packing = Packing(torch.tensor([[0, 0, 1, 1, 1]]))
    with pytest.raises(NotBatchable, match=r"a module's inputs \(\(3, 4\)\) do not show the positions"):
        packing.call(lambda original, args, kwargs: original(*args), nn.Identity(), (torch.zeros(3, 4),), {})
    x = torch.randn(1, 5, 4)
    for own in (True, False):
        found = packing.call(
            lambda original, args, kwargs, own=own: original(args[0] if own else args[0] + 0), nn.Identity(), (x,), {}
        )
        assert torch.equal(found, x)


def test_a_model_that_does_not_keep_sequences_apart_gives_them_one_direction(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = seeded(tiny_opt)
    zo = ZerothOrder(model, "low_rank", seed=0, rows_per_direction=1)
    with caplog.at_level(logging.WARNING, logger="zo_hf"):
        assert len(zo.estimate(loss_of(model, flat(sentences()))).projected_gradients) == 1
    assert "all rows of a step share its directions" in caplog.text


# Runs.


class Ragged(TinyTask):
    """Sequences of 6 to 12 tokens."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {name: row[name][index % 7 :].tolist() for name in ("input_ids", "labels")}


OPTIONS = {"zo_rows_per_direction": 1, "max_steps": 4, "zo_fold_steps": 2, "zo_rank": 2, "zo_eps": EPS}


def packed_run(folder: Path, rows: int = 16, micro_batches: int = 1, **more: Any) -> ZOTrainer:
    given = {"train_dataset": Ragged(), "data_collator": DataCollatorWithFlattening(), **more}
    options = OPTIONS | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
    return make_trainer(folder, seeded(tiny_llama), kind=InOrder, more=given, **options)


def test_micro_batches_give_the_same_steps(tmp_path: Path) -> None:
    found = []
    for rows, micro_batches in ((16, 1), (4, 4)):
        trainer = packed_run(tmp_path / str(rows), rows, micro_batches)
        trainer.train()
        assert len(read_trajectory(tmp_path / str(rows)).records[0].projected_gradients) == 16
        found.append(logged(trainer, "zo/projected_grad"))
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-4)


def test_packed_and_padded_rows_give_the_same_steps(tmp_path: Path) -> None:
    def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        values = {"input_ids": 1, "labels": -100}
        batch = {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
            for name, value in values.items()
        }
        return batch | {"attention_mask": (batch["input_ids"] != 1).long()}

    trainers = [packed_run(tmp_path / "flat"), packed_run(tmp_path / "padded", data_collator=padded)]
    for trainer in trainers:
        trainer.train()
    first, second = (
        [r.projected_gradients for r in read_trajectory(tmp_path / name).records] for name in ("flat", "padded")
    )
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3)


class Changing:
    """Packs as many sequences as a batch has rows, and one more from the second batch on."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        extra = [] if rows[0]["input_ids"] == Ragged()[0]["input_ids"] else rows[:1]
        return DataCollatorWithFlattening()([*rows, *extra])


def test_resume_and_replay_have_the_same_bits(tmp_path: Path) -> None:
    """Rows of later batches may be more than those of the first one, and the process that resumes has not seen it."""
    whole = packed_run(tmp_path, 5, data_collator=Changing(), callbacks=[SaveAt(3)])
    whole.train()
    assert {len(r.projected_gradients) for r in read_trajectory(tmp_path).records} == {5}
    assert_same_bits(weights_of(replay(seeded(tiny_llama), tmp_path)), weights_of(whole.model))
    resumed = packed_run(tmp_path, 5, data_collator=Changing())
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_a_batch_of_one_row_has_a_direction_for_every_sequence_in_it(tmp_path: Path) -> None:
    def pack(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return DataCollatorWithFlattening()([Ragged()[i] for i in range(7)])

    trainer = packed_run(tmp_path, 1, 2, data_collator=pack, callbacks=[SaveAt(2)])
    trainer.train()
    assert {len(r.projected_gradients) for r in read_trajectory(tmp_path).records} == {14}
    resumed = packed_run(tmp_path, 1, 2, data_collator=pack)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(trainer.model))


# Two processes, of which one has fewer sequences in its batch.


def main() -> None:
    """The work of each of the launched processes."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

    def pack(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return DataCollatorWithFlattening()([Ragged()[i] for i in range(7 - 2 * rank)])

    trainer = packed_run(folder, 1, data_collator=pack)
    trainer.train()
    torch.save(weights_of(trainer.model), folder / f"{rank}.pt")


@pytest.mark.slow
def test_processes_number_the_directions_of_the_larger_batch(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("from tests.evaluation.test_packed_rows import main\n\nmain()\n")
    run(script, 2, tmp_path, seconds=200)
    assert_same_bits(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    for record in read_trajectory(tmp_path).records:
        assert [c != 0 for c in record.projected_gradients] == [True] * 12 + [False] * 2
