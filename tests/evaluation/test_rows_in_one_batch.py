"""Both signs of all groups in one forward pass: the same numbers as one after another, where the loss allows it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_opt, weights_of
from tests.evaluation.test_packed_rows import flat, sentences
from tests.evaluation.test_rows import EPS, MODELS, ROWS, SUBSPACES
from tests.subspaces.helpers import loss_of, sgd
from tests.trainer.runs import logged, trained, with_lora
from zo_hf import RowLosses, ZerothOrder
from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation import chunked_head, free_memory
from zo_hf.evaluation.model_loss import LossChecks, ModelLoss


class Calls:
    """Counts a model's forward passes, and keeps the rows of each."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.rows.append(len(kwargs["labels"] if "labels" in kwargs else kwargs["input_ids"]))


def two_steps(model: nn.Module, batch: dict[str, Any], batched: bool | str, **options: Any) -> list[list[float]]:
    """The numbers of the groups in two steps without an update; the first decides, the second is what runs do."""
    zo = ZerothOrder(model, eps=EPS, seed=0, batched=batched, **{"rows_per_direction": 1} | options)
    optimizer, found, checks = sgd(zo, 0.0), [], LossChecks()
    for _ in range(2):
        loss = loss_of(model, batch)
        loss._checks = checks  # of the run, as Trainer's losses share them
        found.append(list(zo.estimate(loss).projected_gradients))
        optimizer.step()
    return found


#: `full` draws all weights for every group, and every part of a model in the same way. LoRA on a router is read outside of
#: its module, where points cannot share a batch.
CASES = [(subspace, name) for subspace in SUBSPACES for name in MODELS if subspace != "full" or name == "opt"]
CASES.remove(("adapter", "mixtral"))


@pytest.mark.parametrize(("subspace", "name"), CASES)
def test_it_gives_the_numbers_of_one_pass_for_each_sign(subspace: str, name: str) -> None:
    build, batch = MODELS[name]

    def made() -> nn.Module:
        model = seeded(build)
        return with_lora(model, target_modules="all-linear") if subspace == "adapter" else model

    alone = two_steps(made(), batch, False, subspace=subspace)
    model = made()
    calls = Calls(model)
    together = two_steps(model, batch, True, subspace=subspace)
    assert calls.rows[-2:] == [2 * ROWS] * 2 and ROWS in calls.rows, "the first step still decides"
    for expected, found in zip(alone, together, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3 * max(map(abs, expected)))
    assert len(alone[1]) == ROWS


@pytest.mark.parametrize("options", [{"estimator": "one_sided"}, {"estimator": "second_difference"}, {"rule": "svrg"}])
@pytest.mark.parametrize("rows_per_direction", [1, 3])
def test_it_works_with_other_probes_and_larger_groups(options: dict[str, Any], rows_per_direction: int) -> None:
    more = options | {"rows_per_direction": rows_per_direction, "num_directions": 2}
    alone = two_steps(seeded(tiny_llama), causal_batch(ROWS), False, **more)
    together = two_steps(seeded(tiny_llama), causal_batch(ROWS), True, **more)
    assert together[1] == pytest.approx(alone[1], rel=1e-2, abs=1e-2 * max(map(abs, alone[1])))


def test_logits_come_in_chunks_of_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = causal_batch(ROWS)
    batch["labels"] = batch["input_ids"]
    alone = two_steps(seeded(tiny_opt), batch, False)
    monkeypatch.setattr(chunked_head, "TOKENS", 2 * ROWS)
    assert two_steps(seeded(tiny_opt), batch, True)[1] == pytest.approx(alone[1], rel=1e-3)


def test_a_loss_of_rows_that_cannot_be_repeated_is_refused() -> None:
    model = seeded(tiny_opt)
    zo = ZerothOrder(model, rows_per_direction=1, batched=True)
    with pytest.raises(
        Exception, match="zo_batched_probes=True cannot evaluate the probes in one batch: the loss is not"
    ):
        zo.estimate(lambda: RowLosses(model(causal_batch(ROWS)["input_ids"]).logits.mean((1, 2))))


def test_a_model_whose_batch_cannot_be_repeated_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(self: ModelLoss, *given: int) -> torch.Tensor:
        raise NotBatchable("its layers see all rows at once")

    monkeypatch.setattr(ModelLoss, "batched_by_groups", refuses)
    monkeypatch.setattr(ModelLoss, "batched", refuses)
    zo = ZerothOrder(seeded(tiny_opt), eps=EPS, seed=0, rows_per_direction=1, batched=True)
    with pytest.raises(NotBatchable, match=r"^zo_batched_probes=True cannot .*: its layers see all rows at once; use"):
        zo.estimate(loss_of(zo.model, causal_batch(ROWS)))
    assert zo.step == 0


def test_the_budget_pays_for_the_first_look_at_one_batch(tmp_path: Path) -> None:
    run = trained(tmp_path, zo_max_forward_passes=7 + 2 * 3, max_steps=-1, zo_batched_probes=True)
    assert run.state.global_step == 4 and logged(run, "zo/forward_passes")[-1] == 13


def test_packed_sequences_cannot_be_repeated_with_directions_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(tiny_llama)
    zo = ZerothOrder(model, eps=EPS, seed=0, rows_per_direction=1, batched=True)
    with caplog.at_level(logging.WARNING):
        assert len(zo.estimate(loss_of(model, flat(sentences()))).projected_gradients) == 1
    assert "all rows of a step share its directions: sequences with directions of their own are packed" in caplog.text


def test_a_batch_that_fails_in_one_pass_is_evaluated_in_two(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = two_steps(seeded(tiny_opt), causal_batch(ROWS), False)

    def fails(self: ModelLoss, groups: int, copies: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ModelLoss, "batched_by_groups", fails)
    with caplog.at_level(logging.WARNING):
        assert two_steps(seeded(tiny_opt), causal_batch(ROWS), True) == alone
    assert "a forward pass for all probes failed (OutOfMemoryError: no room)" in caplog.text


class TestAuto:
    """`auto` takes one pass if the numbers agree and, as far as the device can say, the memory is free."""

    @pytest.fixture
    def says(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
        """Let the CPU look like a device that says how much memory is free."""
        problem: dict[str, str | None] = {"memory": None}
        monkeypatch.setattr(free_memory, "can_say", lambda device: True)
        monkeypatch.setattr(free_memory, "watch", lambda device: None)
        monkeypatch.setattr(free_memory, "why_too_large", lambda device, copies: problem["memory"])
        return problem

    def rows_of_passes(self, batched: bool | str = "auto") -> list[int]:
        model = seeded(tiny_opt)
        calls = Calls(model)
        two_steps(model, causal_batch(ROWS), batched)
        return calls.rows

    def test_a_cpu_makes_one_pass(self) -> None:
        rows = self.rows_of_passes()
        assert rows[-1] == 2 * ROWS and rows[:-1].count(2 * ROWS) == 1, "once in the first step, to compare"

    def test_a_device_with_memory_makes_one(self, says: dict[str, str | None]) -> None:
        assert self.rows_of_passes()[-1] == 2 * ROWS

    def test_a_device_without_memory_makes_two(self, says: dict[str, str | None]) -> None:
        says["memory"] = "it needs 2 GB"
        assert set(self.rows_of_passes()) == {ROWS}

    def test_other_numbers_are_not_taken(
        self, says: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        right = ModelLoss.batched_by_groups
        monkeypatch.setattr(ModelLoss, "batched_by_groups", lambda *given: right(*given).flip(0))
        with caplog.at_level(logging.INFO):
            assert self.rows_of_passes()[-1] == ROWS
        assert "chose False: in one batch the losses differ by" in caplog.text

    def test_processes_with_different_batches_ask_each_other_as_often(self, says: dict[str, str | None]) -> None:
        """Else one of them would wait forever, where the first row of another holds several sequences."""
        asked = []
        for batch in (flat(sentences()), causal_batch(ROWS)):
            model = seeded(tiny_llama)
            zo = ZerothOrder(model, eps=EPS, seed=0, rows_per_direction=1)
            answers: list[bool] = []

            def ask(answer: torch.Tensor, answers: list[bool] = answers) -> bool:
                answers.append(bool(answer))
                return False  # the other process cannot

            zo.evaluator.all_reduce_and = ask
            zo.estimate(loss_of(model, batch))
            assert zo.evaluator.batched is False
            asked.append(answers)
        assert asked == [[False], [True]]

    def test_the_budget_pays_for_the_comparison(self, says: dict[str, str | None], tmp_path: Path) -> None:
        run = trained(tmp_path, zo_max_forward_passes=7 + 2 * 3, max_steps=-1)
        assert run.state.global_step == 4, "2 for a step, and in the first one 3 for the rows and 2 for one batch"
        assert logged(run, "zo/forward_passes")[-1] == 13

    def test_a_resumed_run_goes_on_as_chosen(self, says: dict[str, str | None], tmp_path: Path) -> None:
        whole = trained(tmp_path / "whole", max_steps=4, save_steps=2, save_strategy="steps")
        model = seeded(tiny_opt)
        calls = Calls(model)
        resumed = trained(tmp_path / "resumed", model, max_steps=4, resume=str(tmp_path / "whole" / "checkpoint-2"))
        assert calls.rows[-2:] == [16, 16], "both signs of 8 rows, and no comparison"
        assert logged(resumed, "zo/forward_passes")[-1] == logged(whole, "zo/forward_passes")[-1]
        assert_same_bits(weights_of(whole.model), weights_of(resumed.model))
