"""The gradient noise scale beside what autograd says, and its steps in a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_opt, weights_of
from tests.subspaces.helpers import loss_of, sgd
from tests.trainer.runs import SaveAt, logged, make_trainer
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.noise_scale import NoiseScale
from zo_hf.trajectory import replay


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.2, 8), rows=st.integers(1, 4), directions=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_it_is_found_in_numbers_drawn_with_a_known_one(scale: float, rows: int, directions: int, seed: int) -> None:
    """The numbers of a loss with a gradient of length 1, and rows whose gradients have the variance `scale`."""
    generator = torch.Generator().manual_seed(seed)
    width, groups = 16, 20_000
    gradient = torch.ones(width) / width**0.5
    deviation = torch.randn(groups, width, generator=generator) * (scale / rows / width) ** 0.5
    z = torch.randn(groups // 2, directions, width, generator=generator).repeat_interleave(2, 0)
    numbers = (z @ (gradient + deviation)[:, :, None]).flatten() / groups
    measured = NoiseScale(1)
    assert measured.value(rows) is None
    measured.see(numbers.tolist(), directions)
    found = measured.value(rows)
    noise = 1 + scale / rows
    assert found == pytest.approx(scale, abs=6 * rows * noise * noise * (3 / groups) ** 0.5)


@pytest.mark.parametrize("scale", [1.0, 4.0, 20.0])
def test_the_squared_gradient_is_known_as_well_as_the_guide_says(scale: float) -> None:
    """Its relative error is √((1 + B_s)² + 1) / √N: N pairs count, those of 39 measurements in the running mean."""
    generator = torch.Generator().manual_seed(0)
    runs, measurements, rows = 200, 80, 16
    shared = torch.randn(runs, measurements, rows // 2, 1, generator=generator)
    own = scale**0.5 * torch.randn(runs, measurements, rows // 2, 2, generator=generator)
    numbers = ((shared + own) / rows).flatten(2).tolist()
    found = []
    for run in numbers:
        measured = NoiseScale(1)
        for step in run:
            measured.see(step, 1)
        found.append(measured.state()[0])
    products = torch.tensor(found)
    pairs = rows // 2 * 39
    assert products.mean() == pytest.approx(20, rel=4 * (1 + scale) / (runs * pairs) ** 0.5 + 0.02)
    assert products.std() / products.mean() == pytest.approx((((1 + scale) ** 2 + 1) / pairs) ** 0.5, rel=0.2)


@pytest.mark.parametrize("num_directions", [1, 2])
def test_groups_share_their_directions_in_pairs_at_a_measured_step(num_directions: int) -> None:
    model = seeded(tiny_opt)
    zo = ZerothOrder(model, "norms", seed=0, rows_per_direction=1, num_directions=num_directions, noise_scale_steps=3)
    optimizer = sgd(zo, 0.0)
    for step in range(6):
        zo.estimate(loss_of(model, causal_batch(5)))
        streams = [zo._stream(direction) for direction in range(5 * num_directions)]
        assert len(set(streams)) == (3 if step % 3 == 2 else 5) * num_directions
        optimizer.step()


def test_it_agrees_with_autograd_on_a_model() -> None:
    """The same rows in every step, so that the scale is of these rows: Σ² is their own variance."""
    rows = 8
    model, batch = seeded(tiny_llama), causal_batch(rows)
    batch["input_ids"][:, 1:] = batch["input_ids"][:1, 1:]  # sentences that begin with another word
    batch["labels"] = batch["input_ids"]
    zo = ZerothOrder(model, "norms", eps=1e-3, seed=0, rows_per_direction=1, noise_scale_steps=1)
    optimizer = sgd(zo, 0.0)
    gradients = []
    for row in range(rows):
        with zo.subspace.differentiable() as leaves:
            part = {key: tensor[row : row + 1] for key, tensor in batch.items()}
            parts = torch.autograd.grad(model(**part).loss, leaves)
        gradients.append(torch.cat([p.flatten() for p in parts]))
    every = torch.stack(gradients)
    # Neighbors share a direction, so their products are all that the estimate sees.
    products = (every[::2] * every[1::2]).sum(1).mean()
    expected = (every.square().sum(1).mean() / products - 1).item()
    found = []
    for _ in range(400):
        zo.estimate(loss_of(model, batch))
        optimizer.step()
        assert zo.row_groups is not None
        found.append(zo.row_groups.logs().get("zo/noise_scale"))
    values = [value for value in found[100:] if value is not None]
    assert sum(values) / len(values) == pytest.approx(expected, rel=0.2)


def test_a_run_logs_it_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    options = {"zo_noise_scale_steps": 2, "max_steps": 12, "per_device_train_batch_size": 8, "zo_eps": 1e-2}
    build = partial(make_trainer, tmp_path, **options)
    whole = build(more={"callbacks": [SaveAt(7)]})
    whole.train()
    scales = logged(whole, "zo/noise_scale")
    assert scales and all(scale >= 0 for scale in scales)
    assert_same_bits(weights_of(replay(seeded(tiny_opt), tmp_path)), weights_of(whole.model))
    resumed = build()
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights_of(resumed.model), weights_of(whole.model))
    assert logged(resumed, "zo/noise_scale")[-3:] == scales[-3:]
