"""Values that a subclass's loss detaches are constant over the probes of a batch, as a gradient treats them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from transformers import Trainer

from tests.conftest import seeded, tiny_opt
from tests.trainer.runs import logged
from tests.trainer.test_loss_calls import made
from zo_hf.trainer.detach_test import PROBES_ALONE, DetachTest
from zo_hf.trainer.stop_gradient import StopGradients


class OwnLoss(Trainer):
    """The loss of the last token, times or divided by a detached function of itself."""

    eps = 1e-4

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        logits = model(input_ids=inputs["input_ids"]).logits[:, -2]
        logp = logits.log_softmax(-1).gather(1, inputs["labels"][:, -1:])[:, 0]
        loss = self.loss_of(logp)
        return (loss, {"logits": logits}) if return_outputs else loss

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -logp.mean()


class Ratio(OwnLoss):
    """GRPO's: the ratio of a probability to its own detached value."""

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -torch.exp(logp - logp.detach()).mean()


class Weighted(OwnLoss):
    """DFT's: the log-probability weighted by its own detached probability."""

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -(logp.exp().detach() * logp).mean()


class WeightedByNumber(OwnLoss):
    """Scaled by its own value, as terms of a sum are balanced."""

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return logp.square().mean() * logp.mean().item() / float(logp.square().sum())


class WeightedByData(OwnLoss):
    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -(logp.exp().data * logp).mean()


class WeightedByList(OwnLoss):
    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -(torch.tensor(logp.exp().tolist(), dtype=logp.dtype) * logp).mean()


class WritesItsWeights(OwnLoss):
    """Normalizes in place what it has detached."""

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        weights = logp.exp().detach()
        weights /= weights.sum()
        return -(weights * logp).sum()


class WeightedWithoutGradient(OwnLoss):
    """Computes its weights under `no_grad`, in place and in a function that `no_grad` decorates."""

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weights = (1 - logp.exp()) ** 2
            weights /= weights.sum()
            largest = logp.max(dim=0).values
            filled = torch.zeros_like(logp)
            filled[1:] = logp[1:].exp()
        return -((weights * self.twice(logp) + filled) * logp).sum() - largest * logp.mean()

    @torch.no_grad()
    def twice(self, logp: torch.Tensor) -> torch.Tensor:
        return 2 * logp


class SwitchesGradients(OwnLoss):
    """Switches gradients off and on again by calls, as code without contexts does."""

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        torch.set_grad_enabled(True)
        return -(logp.exp().detach() * logp).mean()


@dataclass
class Features:
    values: torch.Tensor


class Halves(nn.Module):
    """A module that returns an instance of a dataclass."""

    def forward(self, x: torch.Tensor) -> Features:
        return Features(x / 2)


class WeightedByRecord(OwnLoss):
    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = Halves()(logp)
        return (features.values * logp).mean()


class AgreesWithItself(OwnLoss):
    """Compares predictions with a target that the model gives under `no_grad`, whole and by one of its modules."""

    eps = 1e-5  # its curvature shows in a one-sided difference

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        ids = inputs["input_ids"]
        with torch.no_grad():
            target = model(input_ids=ids).logits
            target = (target / 0.4).softmax(-1)
            hidden = model.model(input_ids=ids).last_hidden_state
        outputs = model(input_ids=ids.flip(1), output_hidden_states=True)
        away = (outputs.hidden_states[-1] - hidden).square().mean()
        with torch.set_grad_enabled(False), torch.enable_grad():
            loss = -(target * outputs.logits.log_softmax(-1)).sum(-1).mean() + away
        return (loss, outputs) if return_outputs else loss


STOPS = [
    Ratio,
    Weighted,
    WeightedByNumber,
    WeightedByData,
    WeightedByList,
    WritesItsWeights,
    WeightedWithoutGradient,
    SwitchesGradients,
    WeightedByRecord,
    AgreesWithItself,
]


@pytest.mark.parametrize("kind", [OwnLoss, *STOPS])
@pytest.mark.parametrize("estimator", ["two_point", "one_sided"])
def test_c_is_the_slope_that_a_gradient_gives(tmp_path: Path, kind: type[OwnLoss], estimator: str) -> None:
    options = {"max_steps": 1, "zo_eps": kind.eps, "learning_rate": 1.0, "zo_estimator": estimator}
    trainer = made(kind, tmp_path, seeded(tiny_opt, torch.float64), **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batch: dict[str, Any] = {}
    compute_loss = trainer.compute_loss

    def noted(model: nn.Module, inputs: dict, **kwargs: Any) -> Any:
        batch.update(inputs)
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = noted
    trainer.train()
    (c,) = logged(trainer, "zo/projected_grad")
    step = {name: (p.detach() - before[name]) / -c for name, p in trainer.model.named_parameters()}
    model = seeded(tiny_opt, torch.float64)
    compute_loss(model, batch).backward()
    slope = sum((step[name] * p.grad).sum().item() for name, p in model.named_parameters())
    tolerance = 0.01 if estimator == "two_point" else 0.05
    assert abs(c) > 1e-3 and c == pytest.approx(slope, rel=tolerance, abs=tolerance / 50)


def test_later_evaluations_get_the_first_one_s_values() -> None:
    mode, x = StopGradients(), torch.ones(2)
    with mode:
        first = x.detach()
        integers = torch.ones(2, dtype=torch.long).detach()
    with mode:
        assert (3 * x).detach().equal(first)
        assert (2 * integers).detach()[0] == 2
        assert (3 * x).detach()[0] == 3  # the first evaluation had no second value
    with mode:
        assert torch.ones(3).detach().shape == (3,)  # of another shape


def test_an_interrupt_in_the_forward_leaves_no_mode(tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    trainer = made(Ratio, tmp_path)
    trainer.model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not _get_current_function_mode_stack()


class Reversed(torch.autograd.Function):
    """Changes the sign of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Adversarial(OwnLoss):
    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -Reversed.apply(logp).mean()


@pytest.mark.parametrize(("kind", "times"), [(Adversarial, 1), (OwnLoss, 0)])
def test_a_backward_pass_of_the_loss_s_own_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[OwnLoss], times: int
) -> None:
    apply = vars(torch.autograd.Function)["apply"]
    with caplog.at_level(logging.WARNING, "zo_hf"):
        made(kind, tmp_path, max_steps=2).train()
    assert sum("calls Reversed, which has a backward pass" in record.message for record in caplog.records) == times
    assert vars(torch.autograd.Function)["apply"] is apply


class NumberAlone(OwnLoss):
    """A number without a gradient, such as an error rate."""

    def loss_of(self, logp: torch.Tensor) -> Any:
        return 1.0 - logp.mean().item()


class DetachedAlone(OwnLoss):
    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        return -logp.mean().detach()


@pytest.mark.parametrize("kind", [NumberAlone, DetachedAlone])
def test_a_loss_without_a_gradient_moves_with_the_probe(tmp_path: Path, kind: type[OwnLoss]) -> None:
    numbers = []
    for chosen in (OwnLoss, kind):
        trainer = made(chosen, tmp_path, max_steps=2, zo_batched_probes=False)
        trainer.train()
        numbers.append(logged(trainer, "zo/projected_grad"))
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-2)


class DetachesMetrics(OwnLoss):
    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        self.shown = logp.detach().mean()
        return -logp.mean()


@pytest.mark.parametrize(("kind", "more"), [(OwnLoss, 0), (DetachesMetrics, 0), (Ratio, 1)])
def test_only_values_that_matter_cost_a_forward_pass(tmp_path: Path, kind: type[OwnLoss], more: int) -> None:
    trainer = made(kind, tmp_path, zo_batched_probes=False)
    trainer.train()
    passes = logged(trainer, "zo/forward_passes")
    assert passes == [2, 4 + more, 6 + 2 * more, 8 + 3 * more]


def test_a_probe_with_the_loss_of_the_current_point_decides_nothing() -> None:
    test, device = DetachTest(bool), torch.device("cpu")
    test.see(0.0, 0.0, 0.0, device)
    assert test.matters is None
    test.see(1.0, 1.5, 2.0, device)
    assert test.matters is True
    test = DetachTest(bool)
    test.see(1.0, 1.5, 1.5, device)
    assert test.matters is False


def test_a_loss_without_a_gradient_is_evaluated_more_often_in_the_first_steps_only(tmp_path: Path) -> None:
    class Counted(DetachedAlone):
        calls = 0

        def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
            Counted.calls += 1
            return super().loss_of(logp)

    trainer = made(Counted, tmp_path, max_steps=10, zo_batched_probes=False, zo_rows_per_direction=0)
    trainer.train()
    assert Counted.calls == 10 * 2 + 4 + PROBES_ALONE
