"""Forwards of models whose linear layers and norms are kernels, as on a GPU, beside those of a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import causal_batch, seeded, tiny_gpt2, tiny_llama, tiny_opt
from tests.methods.table import DEVICE
from tests.subspaces.helpers import loss_of
from zo_hf.engine import ZerothOrder
from zo_hf.evaluation.model_loss import LossChecks
from zo_hf.rng import draw as draws
from zo_hf.subspaces import per_group

pytest.importorskip("triton")

BUILDS = {"opt": tiny_opt, "llama": tiny_llama, "gpt2": tiny_gpt2}


def _losses(build: Callable[..., nn.Module], choice: str, directions: int = 1) -> list[Tensor]:
    """The losses at the probes of three steps, with a fold after the second."""
    model = seeded(build, num_hidden_layers=1).to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in causal_batch(2).items()}
    zo = ZerothOrder(
        model, "low_rank", kernels=choice, num_directions=directions, batched=True, fold_steps=2, eps=0.02
    )
    optimizer, checks, found = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-2)), LossChecks(), []
    for _ in range(3):
        found.append(zo.probe(loss_of(model, batch, checks=checks)))
        zo.finish_estimate()
        optimizer.step()
    zo.finish()
    return found


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_losses_are_those_of_torch(
    build: Callable[..., nn.Module], chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _losses(build, "torch")
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    monkeypatch.setattr(per_group, "_BROADCASTS", {})
    calls: list[str] = []
    from zo_hf.kernels import low_rank_product, moved_norm

    for module in (low_rank_product, moved_norm):
        launch = module.launch

        def noted(kernel, *arguments, launch=launch, **options) -> None:
            calls.append(kernel.fn.__name__)
            launch(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", noted)
    for found, wanted in zip(_losses(build, "triton"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        assert found[0] != found[1]
    assert "_add_low_rank_product" in calls
    assert ("_moved_norm" in calls) == (build is not tiny_llama)  # whose norm is transformers' own
