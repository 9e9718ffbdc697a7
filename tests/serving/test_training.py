"""Training on losses that servers give: equal to training in this process, and exact in all that the trainer keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_same_bits, causal_batch
from tests.serving.runs import adapter_of, base, lora, make
from tests.serving.stand_in import StandIn, serving
from tests.trainer.runs import logged
from zo_hf.serving.losses import ServedLoss, read_rows
from zo_hf.trajectory import replay


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    with serving(base) as found:
        yield found


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "optim": "adamw_torch", "max_steps": 2},
        {"zo_estimator": "evolution", "zo_direction": "rademacher"},
        {"zo_estimator": "one_sided", "zo_rule": "svrg", "zo_svrg_batches": 1},
    ],
    ids=str,
)
def test_it_equals_training_in_this_process(options: dict[str, Any], stand_in: StandIn, tmp_path: Path) -> None:
    served = make(tmp_path / "served", stand_in.url, **options)
    served.train()
    own = make(tmp_path / "own", zo_batched_probes=False, **options)
    own.train()
    assert logged(served, "loss") == pytest.approx(logged(own, "loss"), rel=1e-4)
    assert logged(served, "zo/projected_grad") == pytest.approx(logged(own, "zo/projected_grad"), rel=1e-3, abs=1e-3)
    assert logged(served, "zo/forward_passes") == logged(own, "zo/forward_passes")
    assert_close(adapter_of(served), adapter_of(own))
    still = [name for name, value in adapter_of(served).items() if "lora_B" in name and not value.any()]
    assert not still
    assert not stand_in.adapters, "every adapter is forgotten at the end"


def test_resume_and_replay_have_the_same_bits(stand_in: StandIn, tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "zo_num_directions": 1}
    whole = make(tmp_path / "whole", stand_in.url, **options)
    whole.train()
    expected = adapter_of(whole)
    again = make(tmp_path / "again", stand_in.url, **options, save_only_trajectory=True)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_same_bits(adapter_of(again), expected)
    replayed = replay(lora(), tmp_path / "whole")
    assert_same_bits({n: p.detach() for n, p in replayed.named_parameters() if p.requires_grad}, expected)


def test_several_servers_share_the_work(stand_in: StandIn, tmp_path: Path) -> None:
    expected = make(tmp_path / "one", stand_in.url, zo_num_directions=4, max_steps=1)
    expected.train()
    with serving(base) as other:
        both = make(tmp_path / "two", [stand_in.url, other.url], zo_num_directions=4, max_steps=1)
        both.train()
        assert len([path for path, _ in other.requests if path == "/v1/completions"]) > 2
        # And one that marks a server that has not been started anew.
        assert max(stand_in.most, other.most) <= both.args.server_max_loras + 1
    assert_same_bits(adapter_of(both), adapter_of(expected))


def test_the_same_server_serves_what_was_trained(stand_in: StandIn, tmp_path: Path) -> None:
    trainer = make(tmp_path, stand_in.url, max_steps=2)
    trainer.train()
    trainer.save_model()
    from zo_hf.serving.client import Server

    server, rows = Server(stand_in.url, 30.0), causal_batch()["input_ids"]
    server.load("trained", str(tmp_path))
    with torch.no_grad():
        logits = trainer.model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, rows[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(server.log_probabilities("trained", rows.tolist())), expected)
    server.unload("trained")


def padded(side: str) -> dict[str, torch.Tensor]:
    """A batch whose rows have 12, 11, 10 and 9 tokens, some of them labels."""
    batch = causal_batch()
    ids, labels, mask = torch.zeros_like(batch["input_ids"]), torch.full((4, 12), -100), torch.zeros((4, 12)).long()
    for i in range(4):
        here = slice(0, 12 - i) if side == "right" else slice(i, 12)
        ids[i, here], mask[i, here] = batch["input_ids"][i, : 12 - i], 1
        labels[i, here] = torch.where(torch.arange(12 - i) > 2 + i, ids[i, here], -100)
    labels[3] = -100  # a row without labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("num_items", [None, 40])
def test_the_loss_is_the_models_own(side: str, num_items: int | None, stand_in: StandIn, tmp_path: Path) -> None:
    trainer, inputs = make(tmp_path, stand_in.url), padded(side)
    loss = ServedLoss(trainer.served, None, inputs, num_items)()
    with torch.no_grad():
        expected = trainer.model(**inputs, num_items_in_batch=num_items).loss.double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    sent = stand_in.requests[-2][1]
    assert sent["prompt"] == [row.tokens for row in read_rows(inputs)[:3]] and sent["prompt_logprobs"] == 0


def test_a_batch_without_labels_is_skipped(stand_in: StandIn, tmp_path: Path) -> None:
    trainer, inputs = make(tmp_path, stand_in.url), padded("right")
    inputs["labels"][:] = -100
    assert ServedLoss(trainer.served, None, inputs, None)().isnan()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"position_ids": torch.zeros(4, 12)}, "a batch has position_ids, and server_url"),
        ({"labels": None}, "a batch has no labels or no input_ids"),
        ({"labels": torch.full((4, 12), 3)}, "a label differs from the token at its position"),
    ],
    ids=["another input", "no labels", "other labels"],
)
def test_other_batches_are_refused(change: dict[str, Any], error: str) -> None:
    inputs = {name: value for name, value in (causal_batch() | change).items() if value is not None}
    with pytest.raises(ValueError, match=error):
        read_rows(inputs)


def test_a_label_that_nothing_predicts_is_refused() -> None:
    inputs = padded("left")
    inputs["labels"][1, 1] = inputs["input_ids"][1, 1]
    with pytest.raises(ValueError, match="a label is a row's first token or padding"):
        read_rows(inputs)


def test_a_row_that_is_too_long_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with serving(base, longest=12) as short:
        trainer = make(tmp_path, short.url)
        with pytest.raises(RuntimeError, match="a row has 13 tokens with what is generated, and the servers take 12"):
            trainer.train()


def test_servers_get_a_larger_distance_unless_one_is_given(tmp_path: Path) -> None:
    config = make(tmp_path, zo_eps="auto").args
    assert config.settings().eps is None  # the subspace's
    assert replace(config, server_url="http://127.0.0.1:8000").settings().eps == 1e-1
    assert replace(config, server_url="http://127.0.0.1:8000", zo_eps=3e-2).settings().eps == 3e-2
