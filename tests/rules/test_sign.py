"""ZO-signSGD: which way, and not how far."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import assert_same_bits, weights_of
from tests.rules.helpers import engine, estimate_written_out, gradients, linear_task, steps


def test_the_gradient_is_the_mean_of_signed_directions() -> None:
    zo, _ = engine(linear_task()[0], "sign", num_directions=3)
    zo.apply([2.5, -1e-9, 0.0], skipped=False)
    for name, expected in estimate_written_out(zo, [1 / 3, -1 / 3, 0.0]).items():
        torch.testing.assert_close(gradients(zo)[name].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
def test_the_scale_of_the_loss_does_not_matter(subspace: str) -> None:
    """To the bit for a power of two; without the rule it matters."""
    results = {}
    for rule in ("sign", "none"):
        for scale in (1.0, 64.0):
            model, loss = linear_task()
            zo, optimizer = engine(model, rule, 1e-3, subspace)
            steps(zo, optimizer, lambda loss=loss, scale=scale: loss() * scale, 12)
            zo.finish()
            results[rule, scale] = weights_of(model)
    assert_same_bits(results["sign", 64.0], results["sign", 1.0])
    assert not torch.equal(results["none", 64.0]["weight"], results["none", 1.0]["weight"])
