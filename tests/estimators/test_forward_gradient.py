"""The forward gradient on transformers, against autograd's directional derivative, and what it refuses."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.conftest import assert_same_bits, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, weights_of
from tests.quantized_models import quantize
from tests.subspaces.helpers import (
    batch_for,
    direction,
    exact_loss,
    float64_throughout,
    gradient_in_coordinates,
    move_off_the_origin,
    prepared,
)
from tests.trainer.runs import make_trainer
from zo_hf.directions import ELEMENTWISE
from zo_hf.engine import ZerothOrder
from zo_hf.estimators import ForwardGradient
from zo_hf.estimators.probe import Probe
from zo_hf.subspaces import SUBSPACES

MODELS = {"opt": tiny_opt, "llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
SPACES = ("low_rank", "adapter", "core", "norms", "full")


def eager(build: Any, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return seeded(build, dtype, attn_implementation="eager", **options)


def engine(model: nn.Module, subspace: str, **options: Any) -> ZerothOrder:
    rank = {"rank": 3} if subspace == "core" else {}
    space = SUBSPACES[subspace](model, seed=17, **rank)
    zo = ZerothOrder(model, space, estimator="forward_gradient", seed=17, **options)
    move_off_the_origin(space)
    return zo


@pytest.mark.parametrize(
    ("build", "dtype"),
    [*((build, torch.float64) for build in MODELS.values()), (tiny_opt, torch.float32)],
    ids=[*MODELS, "opt float32"],
)
@pytest.mark.parametrize("subspace", SPACES)
def test_it_is_the_directional_derivative(
    subspace: str, build: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding, in every subspace; one call of the model for each direction, and nothing is written or left behind."""
    with float64_throughout(monkeypatch) if dtype == torch.float64 else nullcontext():
        model = prepared(subspace, eager(build, dtype, initializer_range=0.2))
        batch, calls = batch_for(model), 0
        zo = engine(model, subspace, num_directions=2, direction="rademacher")
        before = weights_of(model)

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            return exact_loss(model, batch)

        estimate = zo.estimate(closure)
        assert calls == 2 and zo.forward_passes == 4
        assert_same_bits(weights_of(model), before)
        clean = exact_loss(model, batch).item()
        zo.subspace.detach()

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return exact_loss(lambda **inputs: functional_call(model, parameters, kwargs=inputs), batch)

        gradient = gradient_in_coordinates(zo.subspace, loss)
    norm = sum(g.square().sum() for g in gradient.values()).item() ** 0.5
    # The eager attention of OPT and Llama takes its softmax in float32, whatever the dtype.
    exact = dtype == torch.float64 and build not in (tiny_opt, tiny_llama)
    tolerance = 1e-10 if exact else 1e-6 if dtype == torch.float64 else 1e-4
    assert norm > 0.01
    assert estimate.loss == pytest.approx(clean, rel=tolerance)
    for index, found in enumerate(estimate.projected_gradients):
        z = direction(zo.subspace, index=index, distribution=ELEMENTWISE["rademacher"])
        expected = sum((gradient[name].double() * z[name].double()).sum() for name in gradient)
        assert found == pytest.approx(float(expected), rel=tolerance, abs=tolerance * norm)


@pytest.mark.parametrize("subspace", SPACES)
def test_half_precision_has_the_derivative_to_its_own_digits(subspace: str) -> None:
    """Where a difference of two bfloat16 losses would have none."""
    model = prepared(subspace, eager(tiny_opt, torch.bfloat16, init_std=0.2))
    reference = prepared(subspace, eager(tiny_opt, torch.bfloat16, init_std=0.2)).float()
    found = engine(model, subspace, num_directions=8).estimate(lambda: exact_loss(model, batch_for(model)))
    expected = engine(reference, subspace, num_directions=8).estimate(
        lambda: exact_loss(reference, batch_for(reference))
    )
    found_c, expected_c = (torch.tensor(e.projected_gradients) for e in (found, expected))
    assert (found_c - expected_c).norm() < 0.1 * expected_c.norm()


def test_a_probe_after_it_is_a_plain_one() -> None:
    """No tangent outlives its pass, also when that raised."""
    model = eager(tiny_opt)
    zo = engine(model, "low_rank")

    def fail() -> Tensor:
        exact_loss(model, batch_for(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zo.estimate(fail)
    with zo.subspace.at((Probe(0, 0.0),), zo._stream, zo.distribution):
        loss = exact_loss(model, batch_for(model))
    assert torch.autograd.forward_ad._current_level == -1
    assert torch.equal(loss, exact_loss(model, batch_for(model)))


# Refusals.


def refused(*parts: str, model: nn.Module, **options: Any) -> None:
    """In one sentence that names the way out, and with no trace of the engine left."""
    with pytest.raises(ValueError) as error:
        ZerothOrder(model, estimator="forward_gradient", **options)
    message = str(error.value)
    assert all(part in message for part in parts) and message.endswith(".") and "\n" not in message
    assert not any("forward" in vars(module) for module in model.modules())


def test_attention_without_a_derivative_is_refused() -> None:
    refused("'sdpa'", "attn_implementation='eager'", model=seeded(tiny_opt))
    refused("'sdpa'", "attn_implementation='eager'", model=prepared("adapter", seeded(tiny_opt)), subspace="adapter")


def test_quantized_layers_are_refused() -> None:
    refused("quantized layers", "zo_estimator='two_point'", model=quantize(nn.Sequential(nn.Linear(8, 8))))


def test_one_batch_for_all_is_refused() -> None:
    refused("batched_probes=True", "'auto'", model=nn.Linear(8, 8), batched_probes=True)


def test_the_trainer_refuses_before_it_begins(tmp_path: Path) -> None:
    options: dict[str, Any] = {"zo_estimator": "forward_gradient"}
    with pytest.raises(ValueError, match=r"attn_implementation='eager'\.$"):
        make_trainer(tmp_path, seeded(tiny_opt), **options)
    with pytest.raises(
        ValueError, match=r"^zo_estimator='forward_gradient' does not combine with zo_batched_probes=True"
    ):
        make_trainer(tmp_path, eager(tiny_opt), zo_batched_probes=True, **options)
    with pytest.raises(ValueError, match=r"^torch_compile=True .*forward_gradient"):
        make_trainer(tmp_path, eager(tiny_opt), torch_compile=True, **options)
    with pytest.raises(ValueError, match=r"^fsdp=.*forward_gradient"):
        make_trainer(tmp_path, eager(tiny_opt), fsdp="full_shard", **options)


class Rounded(torch.autograd.Function):
    """A kernel with a backward pass and no forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()


def test_what_has_no_derivative_says_so() -> None:
    model, x = seeded(lambda: nn.Linear(8, 8)), torch.ones(2, 8)
    zo = ZerothOrder(model, estimator="forward_gradient")
    with pytest.raises(ValueError, match=r"cannot differentiate this model \(.*\); use zo_estimator='two_point'\.$"):
        zo.estimate(lambda: Rounded.apply(model(x)).sum())
    for loss in (lambda: (model(x) > 0).sum().float(), lambda: torch.tensor(model(x).sum().item())):
        with pytest.raises(ValueError, match=r"has no derivative; use zo_estimator='two_point'\.$"):
            zo.estimate(loss)


def test_its_probes_come_in_pairs() -> None:
    assert ForwardGradient(1e-3, 2).probes() == [Probe(i, 0.0, d) for i in (0, 1) for d in (False, True)]
