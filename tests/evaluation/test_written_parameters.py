"""Guarantee 1: a parameter that an evaluation of a loss writes is refused, wherever the write is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, weights_of
from tests.evaluation.test_kept_buffers import Layers, loss_of
from tests.subspaces.helpers import sgd
from tests.trainer.runs import logged, trained
from zo_hf import ZOTrainer
from zo_hf.engine import ZerothOrder


class Target(Layers):
    """BYOL's target network, which follows the model in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(8, 8).requires_grad_(False)

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.target.weight.mul_(0.9).add_(self.body.weight, alpha=0.1)
        return x - self.target(x)


class Renormalizes(Layers):
    """An embedding that scales the rows which it looks up, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.max_norm = 1.0


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Target, r"^the loss writes target.weight, and a probe must leave [^.]*on_step_end, [^.]*\.$"),
        (Renormalizes, r"^the embedding embed has max_norm and writes embed.weight [^.]*; set its max_norm=None\.$"),
    ],
)
def test_a_parameter_that_a_forward_writes_is_refused(kind: type[Layers], told: str) -> None:
    """Also one that does not move."""
    model = kind()
    with pytest.raises(ValueError, match=told):
        ZerothOrder(model, "low_rank", rank=2, batched_probes=False).estimate(loss_of(model))


def test_a_write_that_begins_late_is_refused() -> None:
    """In a step in which no mode sees operations."""
    model = Layers()
    zo, loss = ZerothOrder(model, "low_rank", rank=2, batched_probes=False), loss_of(model)
    optimizer, held = sgd(zo, 0.0), model.out.weight
    zo.estimate(loss)
    optimizer.step()

    def writes() -> Tensor:
        with torch.no_grad():
            held.mul_(2)
        return loss()

    with pytest.raises(ValueError, match=r"the loss writes out\.weight"):
        zo.estimate(writes)


def loads_again(model: nn.Module, loss: Callable[[], Tensor], factor: float = 1.0) -> Tensor:
    """Load other weights and the model's own ones again, times a factor."""
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: 2 * tensor for name, tensor in saved.items()})
    model.load_state_dict({name: factor * tensor for name, tensor in saved.items()})
    return loss()


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_a_loss_may_load_other_weights_and_its_own_ones_again_in_every_step(subspace: str) -> None:
    model = Layers()
    zo, loss = ZerothOrder(model, subspace, rank=2, batched_probes=False), loss_of(model)
    optimizer = sgd(zo, 1e-2)
    for _ in range(2):
        before = weights_of(model)
        zo.estimate(lambda: loads_again(model, loss))
        assert_same_bits(weights_of(model), before)
        optimizer.step()
        zo.finish()
    with pytest.raises(ValueError, match=r"the loss writes embed\.weight"):
        zo.estimate(lambda: loads_again(model, loss, factor=1.5))


def test_in_another_model_it_is_refused_in_the_first_step() -> None:
    model, batch = seeded(tiny_llama), causal_batch()
    zo = ZerothOrder(model, "low_rank", batched_probes=False)
    with pytest.raises(ValueError, match=r"the loss writes model\.embed_tokens\.weight"):
        zo.estimate(lambda: loads_again(model, lambda: model(**batch).loss))


def test_a_metric_may_load_other_values_of_what_moves(tmp_path: Path) -> None:
    """As those of a moving average; transformers' models write no parameters of their own."""

    class Averaged(ZOTrainer):
        def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict({name: tensor.clone() for name, tensor in saved.items()})
            return super().prediction_step(model, *args, **kwargs)

    trainer = trained(tmp_path, seeded(tiny_llama), kind=Averaged, max_steps=2, eval_strategy="steps", eval_steps=1)
    assert len(logged(trainer, "eval_loss")) == 2
