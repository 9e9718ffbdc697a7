"""All probes of a step in one forward pass: the same losses, or a plain word that it cannot be done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import (
    LENGTH,
    VOCABULARY,
    causal_batch,
    seeded,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tiny_t5,
)
from tests.subspaces.helpers import (
    EVERY_MODEL,
    EVERY_SUBSPACE,
    MODELS,
    batch_for,
    loss_of,
    move_off_the_origin,
    prepared,
)
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import NotBatchable
from zo_hf.evaluation.model_loss import ModelLoss, only_labeled_logits


def both(model: nn.Module, subspace: str, loss, directions: int, **kwargs) -> tuple[Tensor, Tensor]:
    """Losses at the probes, one after another and in one batch, away from the origin."""
    zo = ZerothOrder(model, subspace, num_directions=directions, **kwargs)
    move_off_the_origin(zo.subspace)
    losses = []
    for batched in (False, True):
        zo.evaluator.batched = batched
        losses.append(zo.probe(loss))
        zo.discard()
    zo.subspace.detach()
    return losses[0], losses[1]


@EVERY_SUBSPACE
@EVERY_MODEL
def test_batched_probes_give_the_losses_of_sequential_ones(subspace: str, build) -> None:
    model = prepared(subspace, seeded(build))
    sequential, batched = both(model, subspace, loss_of(model, batch_for(model)), 3, eps=0.02)
    assert torch.allclose(sequential, batched, rtol=0, atol=2e-6)
    # Of a tiny BERT the norms and biases, or the scales, move the loss by little.
    assert (sequential[::2] - sequential[1::2]).abs().min() > (1e-5 if subspace in ("norms", "scales") else 1e-4)


@EVERY_SUBSPACE
@EVERY_MODEL
def test_batched_probes_are_exact_in_float64(subspace: str, build) -> None:
    """To what transformers' own float32 in losses and norms leaves."""
    options = {"experts_implementation": "eager"} if build is tiny_mixtral else {}  # the fused ones know no float64
    model = prepared(subspace, seeded(build, torch.float64, **options))
    sequential, batched = both(model, subspace, loss_of(model, batch_for(model)), 2, eps=0.02)
    assert torch.allclose(sequential, batched, rtol=0, atol=1e-6)


HALF = [pytest.param(MODELS[name], torch.bfloat16, id=f"{name}-bf16") for name in MODELS]
HALF += [pytest.param(MODELS["opt"], torch.float16, id="opt-fp16")]


@EVERY_SUBSPACE
@pytest.mark.parametrize(("build", "dtype"), HALF)
def test_half_precision_models_batch_too(subspace: str, build, dtype: torch.dtype) -> None:
    model = prepared(subspace, seeded(build, dtype))
    sequential, batched = both(model, subspace, loss_of(model, batch_for(model)), 2, eps=0.02)
    assert torch.allclose(sequential, batched, rtol=0, atol=0.03)


@EVERY_SUBSPACE
@pytest.mark.parametrize("name", ["opt", "mixtral"])
def test_autocast_batches_too(subspace: str, name: str) -> None:
    """float32 weights computing in bf16: the same in one batch, and near the losses of float32."""
    model = prepared(subspace, seeded(MODELS[name]))
    loss = loss_of(model, batch_for(model))
    exact, _ = both(model, subspace, loss, 2, eps=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        sequential, batched = both(model, subspace, loss, 2, eps=0.05)
    assert torch.allclose(sequential, batched, rtol=0, atol=0.03)
    assert torch.allclose(sequential, exact, rtol=0, atol=0.05)


@EVERY_SUBSPACE
@pytest.mark.parametrize(("name", "rows"), [("opt", 3), ("llama", 1), ("gpt2", 3), ("gpt2", 1), ("bert", 3)])
def test_positions_that_are_broadcast_over_the_batch(subspace: str, name: str, rows: int) -> None:
    """Position ids of one row are looked up once for all probes, whose position embeddings differ."""
    model = prepared(subspace, seeded(MODELS[name]))
    batch = {**batch_for(model, rows), "position_ids": torch.arange(LENGTH)[None] + 3}
    sequential, batched = both(model, subspace, loss_of(model, batch), 2, eps=0.02)
    assert torch.allclose(sequential, batched, rtol=0, atol=2e-6)


@EVERY_SUBSPACE
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_padded_batches(subspace: str, name: str) -> None:
    """Left padding, and as many rows as there are labeled positions."""
    model = prepared(subspace, seeded(MODELS[name]))
    batch = causal_batch(2)
    batch["attention_mask"][0, :5] = 0
    batch["labels"][:, -2] = batch["input_ids"][:, -2]
    sequential, batched = both(model, subspace, loss_of(model, batch), 2, eps=0.02)
    assert torch.allclose(sequential, batched, rtol=0, atol=2e-6)


@EVERY_SUBSPACE
def test_num_items_in_batch_divides_the_batched_loss_too(subspace: str) -> None:
    """As the Trainer does it under gradient accumulation, where a micro-batch has a part of the step's labels."""
    model = prepared(subspace, seeded(tiny_llama))
    batch = batch_for(model)
    loss = ModelLoss(
        model,
        model.get_base_model() if subspace == "adapter" else model,
        batch,
        lambda inputs: model(**inputs, num_items_in_batch=7).loss * 2,
        num_items_in_batch=7,
        factor=2.0,
    )
    sequential, batched = both(model, subspace, loss, 2)
    assert torch.allclose(sequential, batched, rtol=0, atol=2e-6)


# Only the logits that a label needs.


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("labels", ["last", "several", "all", "none"])
def test_only_labeled_logits_give_the_loss_of_all_logits(name: str, labels: str) -> None:
    """Where most positions carry a label, or none, everything is left as it is."""
    model = seeded(MODELS[name])
    batch = causal_batch(3)
    if labels == "several":
        batch["labels"][0, 4:6] = batch["input_ids"][0, 4:6]
        batch["labels"][1, 0] = 5  # the first position is predicted by nothing
    elif labels == "all":
        batch["labels"] = batch["input_ids"].clone()
    elif labels == "none":
        batch["labels"][:] = -100
    before = {key: value.clone() for key, value in batch.items()}
    reduced = only_labeled_logits(model, batch)
    assert ("logits_to_keep" in reduced) == (labels in ("last", "several"))
    with torch.no_grad():
        full, part = model(**batch), model(**reduced)
    expected = {"last": 1, "several": 3, "all": LENGTH, "none": LENGTH}[labels]
    assert part.logits.shape == (3, expected, VOCABULARY)
    assert torch.allclose(part.loss, full.loss, rtol=1e-6, equal_nan=True)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_a_classifier_and_an_encoder_decoder_keep_all_logits() -> None:
    for build, labels in ((tiny_bert, torch.tensor([0, 1])), (tiny_t5, causal_batch(2)["labels"])):
        batch = {**causal_batch(2), "labels": labels}
        assert only_labeled_logits(seeded(build), batch) == batch


# "auto".

TRUE_CANNOT = "zo_batched_probes=True cannot evaluate the probes in one batch"


def decided(zo: ZerothOrder, loss, caplog: pytest.LogCaptureFixture) -> tuple[bool | None, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="zo_hf"):
        zo.estimate(loss)
    (message,) = [record.message for record in caplog.records if "zo_batched_probes" in record.message]
    return zo.evaluator.batched, message


@EVERY_SUBSPACE
def test_auto_chooses_one_batch_for_a_models_loss_of(subspace: str, caplog: pytest.LogCaptureFixture) -> None:
    model = prepared(subspace, seeded(tiny_opt))
    zo = ZerothOrder(model, subspace, num_directions=2)
    loss = loss_of(model, batch_for(model))
    batched, message = decided(zo, loss, caplog)
    assert batched is True
    assert "'auto' chose True" in message
    assert zo.evaluator.forward_passes == 8  # both ways, to compare
    zo.estimate(loss)
    assert zo.evaluator.forward_passes == 12
    assert len([r for r in caplog.records if "zo_batched_probes" in r.message]) == 1


@EVERY_SUBSPACE
def test_auto_goes_one_by_one_for_a_plain_closure(subspace: str, caplog: pytest.LogCaptureFixture) -> None:
    """And evaluates nothing in vain to find out."""
    model = prepared(subspace, seeded(tiny_opt))
    batch = batch_for(model)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return model(**batch).loss

    zo = ZerothOrder(model, subspace, num_directions=2)
    batched, message = decided(zo, closure, caplog)
    assert batched is False
    assert message == "zo_batched_probes='auto' chose False: the loss is not the model's own"
    assert zo.evaluator.forward_passes == len(calls) == 4
    zo.estimate(closure)
    assert zo.evaluator.forward_passes == len(calls) == 8


class MixesRows(nn.Module):
    """Subtracts the mean over the batch, as batch normalization does."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@EVERY_SUBSPACE
def test_auto_goes_one_by_one_where_rows_see_each_other(subspace: str, caplog: pytest.LogCaptureFixture) -> None:
    """In one batch the probes would see each other; the losses of the first step are the sequential ones."""
    model = seeded(tiny_opt)
    layer = model.model.decoder.layers[0]
    layer.activation_fn = nn.Sequential(MixesRows(), nn.ReLU())
    model = prepared(subspace, model)
    loss = loss_of(model, batch_for(model))
    zo = ZerothOrder(model, subspace, num_directions=2, eps=0.05)
    found = zo.probe(loss)
    zo.discard()
    assert zo.evaluator.batched is False
    assert torch.equal(zo.probe(loss), found)
    zo.discard()

    zo.evaluator.batched = None
    zo.evaluator.forward_passes = 0
    batched, message = decided(zo, loss, caplog)
    assert batched is False
    assert "chose False: in one batch the losses differ by" in message
    assert zo.evaluator.forward_passes == 8


class FixedShape(nn.Module):
    """Insists on the number of rows it has always seen, as a layer with a buffer of that size does."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.rows:
            raise ValueError(f"expected {self.rows} rows and got {len(x)}")
        return x.relu()


@EVERY_SUBSPACE
def test_auto_goes_one_by_one_where_the_model_refuses_a_larger_batch(
    subspace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in one batch, after the same losses came one by one, is the batch's fault and no reason to stop."""
    model = seeded(tiny_opt)
    model.model.decoder.layers[0].activation_fn = FixedShape(rows=4 * LENGTH)
    model = prepared(subspace, model)
    zo = ZerothOrder(model, subspace, num_directions=2)
    batched, message = decided(zo, loss_of(model, batch_for(model)), caplog)
    assert batched is False
    assert message == "zo_batched_probes='auto' chose False: expected 48 rows and got 192"
    assert zo.evaluator.forward_passes == 4


class SharedTable(nn.Module):
    """A layer fed with one row for the whole batch, as relative position projections are."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table = nn.Linear(32, 32)
        self.layer = layer

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.layer(x, *args, **kwargs) + self.table(torch.ones(1, x.shape[1], 32, dtype=x.dtype))


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_linear_layer_without_the_batch_in_front_is_not_batched(subspace: str) -> None:
    """Its tokens can be divided by the number of probes and would be, wrongly and in silence."""
    model = seeded(tiny_llama)
    model.model.layers[0].mlp = SharedTable(model.model.layers[0].mlp)
    loss = loss_of(model, batch_for(model))
    with pytest.raises(
        NotBatchable, match=rf"^{TRUE_CANNOT}: a linear layer sees 1 rows, which 2 probes cannot share equally; use"
    ):
        ZerothOrder(model, subspace, batched_probes=True).estimate(loss)


class AddsDistances(nn.Module):
    """A layer with a table of distances between positions, as MPNet and many music and speech models have."""

    def __init__(self, layer: nn.Module, ids_of: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.table, self.layer, self.ids_of = nn.Embedding(64, 32), layer, ids_of

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        looked_up = self.table(self.ids_of(x.shape[1]))
        return self.layer(x, *args, **kwargs) + looked_up.flatten(0, -2).mean(0)


DISTANCES = {
    "square": lambda length: (torch.arange(length)[:, None] - torch.arange(length)).abs(),
    "longer than the batch": lambda length: torch.arange(2 * length - 2)[:, None] + torch.arange(length),
    "positions": torch.arange,
}


@pytest.mark.parametrize("length", [LENGTH, 8, 16])
@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("subspace", ["low_rank", "core", "full"])
def test_a_lookup_without_the_batch_in_front_is_not_batched(subspace: str, name: str, length: int) -> None:
    """The lengths can be divided by two probes, and some by their rows, too."""
    model = seeded(tiny_llama)
    model.model.layers[0].mlp = AddsDistances(model.model.layers[0].mlp, DISTANCES[name])
    batch = {key: value[:4, :1].expand(4, length).contiguous() for key, value in batch_for(model).items()}
    loss = loss_of(model, batch)
    with pytest.raises(NotBatchable, match=rf"^{TRUE_CANNOT}: an embedding looks up \d+ positions that belong to no"):
        ZerothOrder(model, subspace, batched_probes=True).estimate(loss)


class AddsTable(nn.Module):
    """Takes what all rows share before what carries the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return x * self.weight + table


class AddsPositions(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.add = layer, AddsTable()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(torch.linspace(-1, 1, x.shape[1] * 32, dtype=x.dtype).view(1, -1, 32), self.layer(x))


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_shared_input_may_come_first(subspace: str) -> None:
    model = seeded(tiny_llama)
    model.model.layers[0].mlp = AddsPositions(model.model.layers[0].mlp)
    sequential, batched = both(model, subspace, loss_of(model, batch_for(model)), 2, eps=0.02)
    assert torch.allclose(sequential, batched, rtol=0, atol=2e-6)


# True.


@EVERY_SUBSPACE
def test_true_refuses_what_cannot_be_batched(subspace: str) -> None:
    model = prepared(subspace, seeded(tiny_opt))
    batch = batch_for(model)
    zo = ZerothOrder(model, subspace, batched_probes=True)
    with pytest.raises(NotBatchable, match=rf"^{TRUE_CANNOT}: the loss is not the model's own; use"):
        zo.estimate(lambda: model(**batch).loss)


class HoldsBoth(nn.Module):
    """A parameter of its own beside a child that moves too: groups inside of groups."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.bias


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_module_with_parameters_and_moving_children(subspace: str) -> None:
    """Sequential probes are right, one batch is refused with its name."""
    model = seeded(tiny_llama)
    model.model.layers[0].mlp = HoldsBoth(model.model.layers[0].mlp)
    loss = loss_of(model, batch_for(model))
    with pytest.raises(
        NotBatchable, match=rf"^{TRUE_CANNOT}: HoldsBoth has both parameters and child modules with parameters; use"
    ):
        ZerothOrder(model, subspace, batched_probes=True).estimate(loss)
    zo = ZerothOrder(seeded(tiny_llama), subspace)
    assert zo.estimate(loss_of(zo.model, batch_for(zo.model))).is_finite


# Counting.


@EVERY_SUBSPACE
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("directions", [1, 4])
def test_forward_passes_are_counted_exactly(subspace: str, batched: bool, directions: int) -> None:
    """A row of the batch that is evaluated once counts once, however many share a call."""
    model = prepared(subspace, seeded(partial(tiny_llama, num_hidden_layers=1)))
    rows_seen = 0

    def count(_: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal rows_seen
        rows_seen += len(kwargs["input_ids"])

    model.register_forward_pre_hook(count, with_kwargs=True)
    zo = ZerothOrder(model, subspace, num_directions=directions, batched_probes=batched)
    for _ in range(3):
        zo.estimate(loss_of(model, batch_for(model, rows=2)))
    assert zo.evaluator.forward_passes == 3 * len(zo.estimator.probes()) == rows_seen // 2
