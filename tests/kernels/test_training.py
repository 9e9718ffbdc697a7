"""Whole runs with kernels, beside runs without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_opt, weights_of
from tests.methods.table import DEVICE
from tests.subspaces.helpers import sgd
from tests.trainer.runs import trained
from zo_hf import ZerothOrder, checkpoint, kernels
from zo_hf.case import Case
from zo_hf.compatibility import auto_direction
from zo_hf.directions import Gaussian, Rademacher
from zo_hf.directions.distributions import DrawnByKernels
from zo_hf.estimators.estimate import Estimate
from zo_hf.rng import Stream
from zo_hf.settings import Settings
from zo_hf.subspaces import per_group
from zo_hf.subspaces.factors import Factors

pytest.importorskip("triton")


def run(
    choice: str, subspace: str, dtype: torch.dtype, steps: int = 2, **options: Any
) -> tuple[list[Estimate], dict[str, torch.Tensor]]:
    """The estimates of some steps, and the weights after them."""
    model = seeded(tiny_opt, dtype, num_hidden_layers=1).to(DEVICE)
    zo = ZerothOrder(model, subspace, kernels=choice, seed=1, **options)
    optimizer = sgd(zo, lr=1e-2, weight_decay=1e-2)
    batch = {name: tensor.to(DEVICE) for name, tensor in causal_batch(2, 5).items()}
    try:
        found = []
        for _ in range(steps):
            found.append(zo.estimate(lambda: model(**batch).loss))
            optimizer.step()
        return found, weights_of(zo.finish())
    finally:
        kernels.choose("auto", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_low_rank_steps_and_folds_have_the_same_bits(
    dtype: torch.dtype, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one term in the product of factors, which no order of summation can change.

    Kernels for corrections and norms, which a CPU does not take, sum in another order.
    """
    monkeypatch.setattr(Factors, "add_product", lambda *_: False)
    monkeypatch.setattr(per_group, "_by_kernel", lambda *_: None)
    options = {"steps": 3, "rank": 1, "fold_steps": 2, "direction": direction, "num_directions": 2}
    found, weights = run("triton", "low_rank", dtype, **options)
    expected, expected_weights = run("torch", "low_rank", dtype, **options)
    assert found == expected
    assert_same_bits(weights, expected_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_steps_along_gaussian_directions_have_the_same_bits(dtype: torch.dtype) -> None:
    found, weights = run("triton", "full", dtype, num_directions=2)
    expected, expected_weights = run("torch", "full", dtype, num_directions=2)
    assert found == expected
    assert_same_bits(weights, expected_weights)


def test_full_steps_along_signs_agree() -> None:
    """Their probes add in another order, and so do not end in the same bits."""
    options = {"direction": "rademacher", "eps": 1e-2}
    found, weights = run("triton", "full", torch.float32, **options)
    expected, expected_weights = run("torch", "full", torch.float32, **options)
    for here, there in zip(found, expected, strict=True):
        assert here.projected_gradients == pytest.approx(there.projected_gradients, rel=1e-3, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-5)


class Larger(Gaussian):
    """Three times the numbers of its base; the class that has kernels draws others."""

    name = "larger"

    def draw_slice(self, stream: Stream, name: str, start: int, values: torch.Tensor) -> torch.Tensor:
        return 3.0 * super().draw_slice(stream, name, start, values)


class Opposite(Rademacher):
    """The other sign."""

    name = "opposite"

    @staticmethod
    def decode(packed: torch.Tensor) -> torch.Tensor:
        return -Rademacher.decode(packed)


@pytest.mark.parametrize("kind", [Larger, Opposite])
def test_a_class_that_derives_from_one_with_kernels_moves_along_what_it_probed(
    kind: type[DrawnByKernels], chosen: None
) -> None:
    layer, x, outputs = nn.Linear(32, 4, bias=False).to(DEVICE), torch.eye(32, device=DEVICE), []
    layer.weight.data.zero_()
    zo = ZerothOrder(layer, "full", direction=kind(), kernels="triton", eps=1.0, max_projected_grad=0.0, seed=0)
    optimizer = sgd(zo, lr=1.0)

    def loss() -> torch.Tensor:
        outputs.append(layer(x).detach())
        return outputs[-1].sum()

    (c,) = zo.estimate(loss).projected_gradients
    optimizer.step()
    kernels.choose("torch", DEVICE)
    z = kind().draw_slice(Stream(0, 0, 0), "weight", 0, layer.weight.detach().flatten()).view(4, 32)
    torch.testing.assert_close((outputs[0] - outputs[1]).t() / 2, z)
    torch.testing.assert_close(-layer.weight.detach() / c, z)


class Loss:
    """The mean square of a layer's outputs, for one probe or for several in a batch."""

    rows = 4

    def __init__(self) -> None:
        self.model = nn.Linear(32, 3).to(DEVICE)
        self._x = torch.linspace(-1, 1, 4 * 32, device=DEVICE).view(4, 32)

    def __call__(self) -> torch.Tensor:
        return self.batched(1)[0]

    def batched(self, copies: int) -> torch.Tensor:
        return self.model(self._x.repeat(copies, 1)).square().view(copies, -1).mean(1)


@pytest.mark.parametrize("estimator", ["two_point", "one_sided"])
def test_probes_share_a_batch_or_do_not(estimator: str, chosen: None) -> None:
    """Both ways take the kernel, and differ by rounding alone."""
    loss, found = Loss(), []
    for batched in (True, False):
        options = {"estimator": estimator, "num_directions": 2, "direction": "rademacher", "eps": 1e-2}
        zo = ZerothOrder(loss.model, "full", kernels="triton", batched_probes=batched, **options)
        found.append(zo.estimate(loss).projected_gradients)
        zo.subspace.detach()
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_trainer_takes_signs_for_all_weights(tmp_path: Path) -> None:
    """And notes them in its checkpoint, so that a run that goes on elsewhere keeps them."""
    trainer = trained(
        tmp_path,
        seeded(tiny_opt, num_hidden_layers=1),
        max_steps=1,
        zo_subspace="full",
        zo_kernels="triton",
        learning_rate=1e-4,
        use_cpu=DEVICE.type == "cpu",
        save_strategy="steps",
        save_steps=1,
    )
    assert trainer.state.global_step == 1
    assert checkpoint.read_state(tmp_path / "checkpoint-1")["settings"]["zo_direction"] == "rademacher"


@pytest.mark.parametrize(
    ("options", "facts", "expected"),
    [
        ({"subspace": "full"}, {"kernels"}, "rademacher"),
        ({"subspace": "full"}, set(), "gaussian"),
        ({"subspace": "low_rank"}, {"kernels"}, "gaussian"),
        ({"subspace": "full", "rule": "sign"}, {"kernels"}, "gaussian"),
        ({"subspace": "full", "estimator": "forward_gradient"}, {"kernels"}, "gaussian"),
        ({"subspace": "full", "estimator": "coordinate"}, {"kernels"}, "gaussian"),
    ],
)
def test_auto_takes_signs_where_the_kernel_does(options: dict[str, Any], facts: set[str], expected: str) -> None:
    case = Case(Settings(rows_per_direction=0, **options), facts=frozenset(facts))
    assert auto_direction(case) == expected
