"""HiZOO: directions divided by the root of a running curvature."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import assert_same_bits, seeded, tiny_opt, weights_of
from tests.rules.helpers import Quadratic, engine, estimate_written_out, gradients, linear_task, steps
from zo_hf.directions import GAUSSIAN
from zo_hf.rng import Stream, draw_slice
from zo_hf.subspaces import Adapter


def test_the_clean_loss_gives_the_second_difference() -> None:
    """κ = zᵀ∇²L z, exactly, on a quadratic."""
    model = Quadratic(torch.tensor([1.0, 4.0, 0.0, -2.0], dtype=torch.float64))
    zo, _ = engine(model, "none", estimator="second_difference", num_directions=2, eps=0.1)
    numbers: list[float] = []
    zo.on_step = None
    losses = zo.probe(model)
    assert losses[0] == model()
    numbers = zo.estimator.projected_gradients(losses.tolist())
    for index in range(2):
        z = draw_slice(Stream(0, 0, index), "x", 0, 4, GAUSSIAN).double()
        assert numbers[index] == pytest.approx(float(z @ (model.curvature * (model.x - 1)).detach()), rel=1e-9)
        assert numbers[2 + index] == pytest.approx(float(z * z @ model.curvature), rel=1e-9)


def test_a_run_is_the_formula_written_out() -> None:
    """Probe ξ ± ε·z/√h, step with the h that was probed, then h ← (1-s)h + s·mean ½|κ|·h·z²."""
    a = torch.tensor([1.0, 9.0, 0.5, -3.0, 2.0], dtype=torch.float64)
    model, eps, lr, s = Quadratic(a), 0.1, 1e-2, 0.05
    zo, optimizer = engine(model, "curvature", lr, options={"curvature_rate": s}, eps=eps, num_directions=2)
    x, h = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)

    def loss(x: torch.Tensor) -> float:
        return float(0.5 * (a * (x - 1).square()).sum())

    for step in range(12):
        gradient, seen = torch.zeros_like(x), torch.zeros_like(x)
        for index in range(2):
            z = draw_slice(Stream(0, step, index), "x", 0, 5, GAUSSIAN).double()
            u = z / h.sqrt()
            plus, minus, clean = loss(x + eps * u), loss(x - eps * u), loss(x)
            gradient += (plus - minus) / (2 * eps) * u / 2
            seen += abs(plus + minus - 2 * clean) / (2 * eps**2) * h * z * z / 2
        steps(zo, optimizer, model, 1)
        x, h = x - lr * gradient, (1 - s) * h + s * seen
        # At a fold the coordinates go into the weight and h stays.
        torch.testing.assert_close(model.x.detach() + zo.subspace.coordinates["x"].detach(), x, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(zo.rule.state()["x"], h, rtol=1e-6, atol=0)
    assert zo.step > 8 and zo.subspace.drawn_at == 8


def test_h_tends_to_the_diagonal_of_the_hessian() -> None:
    """Up to the factor (d + 2)/2, which the file derives."""
    a = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    zo, optimizer = engine(Quadratic(a), "curvature", 0.0, options={"curvature_rate": 0.06}, num_directions=8)
    zo.rule.load_state({"x": torch.full((3,), 5.0, dtype=torch.float64)})
    mean = torch.zeros(3, dtype=torch.float64)
    for step in range(240):
        h = zo.rule.state()["x"]
        z = [draw_slice(Stream(0, step, index), "x", 0, 3, GAUSSIAN).double() for index in range(8)]
        zo.apply([0.0] * 8 + [float(a / h @ (zi * zi)) for zi in z], skipped=False)
        optimizer.step()
        mean += h / 120 if step >= 120 else 0.0
    torch.testing.assert_close(mean, a * 2.5, rtol=0.25, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_a_rate_of_zero_it_is_the_plain_rule_to_the_bit(dtype: torch.dtype) -> None:
    results = []
    for rule, options in (("curvature", {"curvature_rate": 0.0}), ("none", {})):
        model = linear_task()[0].to(dtype)
        zo, optimizer = engine(
            model, rule, options=options, estimator="second_difference", num_directions=2, batched_probes=False
        )
        x = torch.randn(8, 6, dtype=dtype, generator=torch.Generator().manual_seed(3))
        steps(zo, optimizer, lambda model=model, x=x: model(x).square().mean(), 20)
        zo.finish()
        results.append(weights_of(model))
    assert_same_bits(results[0], results[1])


def test_the_step_goes_along_what_was_probed() -> None:
    """The gradient is c·z/√h with the h of the probe, although h is another afterwards."""
    zo, optimizer = engine(Quadratic(torch.arange(1.0, 6.0)), "curvature", options={"curvature_rate": 0.1})
    steps(zo, optimizer, zo.model, 6)
    h = zo.rule.state()["x"].double()
    estimate = zo.estimate(zo.model)
    assert not torch.equal(zo.rule.state()["x"].double(), h)
    expected = estimate_written_out(zo, [c / 4 for c in estimate.projected_gradients])["x"] / h.sqrt()
    torch.testing.assert_close(gradients(zo)["x"].double(), expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_has_a_curvature_of_its_own_weights() -> None:
    from tests.trainer.runs import with_lora

    model = with_lora(seeded(tiny_opt))
    zo, _ = engine(model, "curvature", subspace="adapter", options={"curvature_rate": 0.5}, num_directions=1)
    assert isinstance(zo.subspace, Adapter)
    zo.apply([1.0, 2.0], skipped=False)
    for name, h in zo.rule.state().items():
        z = draw_slice(Stream(0, 0, 0), name, 0, h.numel(), GAUSSIAN).view(h.shape)
        torch.testing.assert_close(h, 0.5 + 0.5 * z.square())
