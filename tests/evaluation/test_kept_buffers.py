"""Buffers that a forward writes: every probe begins with the same ones, and a run leaves them as they were."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import assert_same_bits, weights_of
from tests.quantization.stand_ins import Awq
from tests.subspaces.helpers import sgd
from tests.trainer.runs import trained
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation import kept_buffers
from zo_hf.evaluation.evaluate import At
from zo_hf.trajectory import replay


class Layers(nn.Module):
    """An embedding, something between, a head, and a parameter without elements; the third token is the label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.out = nn.Embedding(128, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.nothing = nn.Parameter(torch.zeros(0, 3))

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> dict[str, Tensor]:
        logits = self.out(torch.tanh(self.between(self.body(self.embed(input_ids % 128))))).mean(1)
        return {"loss": F.cross_entropy(logits, input_ids[:, 2] % 4), "logits": logits}


class Counts(Layers):
    """Counts its calls, and scales by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def between(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


class RunningMean(Layers):
    """Binds a new tensor in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def between(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean((0, 1))
        return x - self.mean


class TrainingNorm(Layers):
    """A batch norm that stays in training mode; its kernel writes its buffers without a new version."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def between(self, x: Tensor) -> Tensor:
        return self.norm.train()(x.transpose(1, 2)).transpose(1, 2)


WRITE = [Counts, RunningMean, TrainingNorm]


def loss_of(model: nn.Module) -> Any:
    ids = torch.arange(48).view(4, 12) * 7 % 128
    return lambda: model(ids)["loss"]


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
@pytest.mark.parametrize("kind", WRITE)
def test_every_probe_sees_the_buffers_from_before(kind: type[Layers], subspace: str) -> None:
    """So the loss at a point is that of a model that nobody has called."""
    model = kind()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    zo = ZerothOrder(model, subspace, rank=2, seed=0, batched_probes=False)
    optimizer = sgd(zo, 1e-2)
    for _ in range(2):
        weights = weights_of(model)
        (probe, *_), loss = zo.estimator.probes(), loss_of(model)
        at_probe = zo.losses_at([(loss, 1.0)], [probe])
        assert zo.losses_at([(loss, 1.0)], [probe]) == at_probe
        zo.estimate(loss)
        assert_same_bits(weights_of(model), weights)
        optimizer.step()
    assert_same_bits(dict(model.named_buffers()), before)


@pytest.mark.parametrize("kind", WRITE)
def test_a_run_leaves_them_and_can_be_replayed(tmp_path: Path, kind: type[Layers]) -> None:
    before = dict(kind().named_buffers())
    trainer = trained(tmp_path, kind(), max_steps=3, zo_rank=2, eval_strategy="steps", eval_steps=1)
    assert_same_bits(dict(trainer.model.named_buffers()), before)
    assert_same_bits(weights_of(replay(kind(), tmp_path)), weights_of(trainer.model))


class Population:
    """A loss that evaluates all of its members at once, as one of generated answers does."""

    def __init__(self, model: nn.Module) -> None:
        self._loss = loss_of(model)

    def __call__(self) -> Tensor:
        return self._loss()

    def losses_at(self, probes: Sequence[Probe], at: At) -> Tensor:
        losses = []
        for probe in probes:
            with at((probe,), 0):
                losses.append(self._loss())
        return torch.stack(losses).double()


@pytest.mark.parametrize("kind", WRITE)
def test_members_of_a_population_see_the_buffers_from_before(kind: type[Layers]) -> None:
    model, alone = kind(), kind()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options: dict[str, Any] = {"rank": 2, "seed": 0, "batched_probes": False}
    together = ZerothOrder(model, "low_rank", **options).estimate(Population(model))
    one_by_one = ZerothOrder(alone, "low_rank", **options).estimate(loss_of(alone))
    assert together == one_by_one
    assert_same_bits(dict(model.named_buffers()), before)


def test_codes_of_quantized_layers_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Size] = []
    model = Counts()
    model.body = Awq(nn.Linear(8, 8))  # type: ignore[assignment]
    zo, clone = ZerothOrder(model, "low_rank", rank=2, batched_probes=False), Tensor.clone

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied.append(tensor.shape)
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", noted)
    with zo.evaluator.leaving_model(zo.subspace):
        pass
    assert copied == [model.count.shape]


def test_a_cache_stays_as_the_forward_leaves_it() -> None:
    model = Layers()
    model.register_buffer("seen", torch.zeros(()), persistent=False)
    model.between = lambda x: x + 0 * model.seen.add_(1)  # type: ignore[method-assign]
    ZerothOrder(model, "low_rank", rank=2, batched_probes=False).estimate(loss_of(model))
    assert model.seen == 2


@pytest.mark.parametrize("persistent", [True, False])
def test_one_that_a_forward_makes_is_none_again_unless_it_is_a_cache(
    persistent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the second probe would read the mean at the first."""

    class Makes(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", None, persistent=persistent)
            self.made = 0

        def between(self, x: Tensor) -> Tensor:
            if self.mean is None:
                self.made, self.mean = self.made + 1, x.detach().mean((0, 1))
            return x - self.mean

    model = Makes()
    zo = ZerothOrder(model, "low_rank", rank=2, seed=0, eps=1e-2, batched_probes=False)
    (probe, other), loss = zo.estimator.probes(), loss_of(model)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        found = zo.losses_at([(loss, 1.0)], [probe, other])
    told = "the forward of Makes makes its buffer 'mean', which is None again after every probe; make it in"
    assert len([m for m in caplog.messages if m.startswith(told)]) == persistent
    assert (model.made, model.mean is None, "mean" in model.state_dict()) == (
        (2, True, False) if persistent else (1, False, False)
    )
    alone = ZerothOrder(Makes(), "low_rank", rank=2, seed=0, eps=1e-2, batched_probes=False)
    at_other = alone.losses_at([(loss_of(alone.model), 1.0)], [other])
    assert (found[1] == at_other[0]) is persistent


def test_an_exception_restores_them() -> None:
    model = Counts()
    zo, loss = ZerothOrder(model, "low_rank", rank=2, batched_probes=False), loss_of(model)

    def interrupted() -> Tensor:
        loss()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zo.estimate(interrupted)
    assert model.count == 0


def test_a_large_one_is_refused_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_buffers, "MOST_ELEMENTS", 0)
    model = Counts()
    with pytest.raises(
        ValueError, match=r"^the forward of Counts has written its buffer 'count', which probes [^.]*\.$"
    ):
        ZerothOrder(model, "low_rank", rank=2, batched_probes=False).estimate(loss_of(model))


def test_a_run_says_once_that_it_leaves_them(caplog: pytest.LogCaptureFixture) -> None:
    model = Counts()
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        for _ in range(2):
            zo.estimate(loss_of(model))
    assert len([m for m in caplog.messages if m.startswith("the forward of Counts writes its buffer 'count'; ")]) == 1


def test_one_that_is_written_late_is_kept_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    class Late(Counts):
        calls = 0

        def between(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().between(x) if self.calls > 2 else x

    model = Late()
    zo = ZerothOrder(model, "low_rank", rank=2, batched_probes=False)
    with caplog.at_level(logging.WARNING, "zo_hf"):
        for _ in range(3):
            zo.estimate(loss_of(model))
    assert model.count == 1
    assert len([m for m in caplog.messages if "has written its buffer 'count' for the first time" in m]) == 1
