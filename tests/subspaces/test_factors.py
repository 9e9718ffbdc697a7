"""Factors of all layers in one tensor, and vectors moved together, as on a device with launches: the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.conftest import causal_batch, seeded, tiny_gpt2, tiny_llama, tiny_opt
from tests.subspaces.helpers import loss_of
from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.evaluation.model_loss import LossChecks
from zo_hf.rng import Stream
from zo_hf.rng import draw as draws
from zo_hf.subspaces import LowRank, per_group
from zo_hf.subspaces.factors import width_of

ROWS = 2
BUILDS = {"opt": tiny_opt, "llama": tiny_llama, "gpt2": tiny_gpt2}


def _space(build, dtype: torch.dtype, rank: int) -> LowRank:
    space = LowRank(seeded(build, dtype), rank=rank, seed=3)
    generator = torch.Generator().manual_seed(1)
    for coordinate in space.coordinates.values():
        coordinate.data = 1e-2 * torch.randn(coordinate.shape, generator=generator).to(coordinate.dtype)
    space.coordinates_changed()
    return space


def _logits(space: LowRank, probes: list[Probe]) -> Tensor:
    """Logits at every probe from one forward, and at the coordinates themselves from another."""
    batch = {name: value for name, value in causal_batch(ROWS).items() if name != "labels"}
    together = {name: value.repeat(len(probes), 1) for name, value in batch.items()}
    space.attach()
    try:
        with torch.no_grad(), space.at(probes, lambda i: Stream(5, direction=i), GAUSSIAN, rows=ROWS):
            at_probes = space.model(**together).logits
        with torch.no_grad():
            return torch.cat((at_probes, space.model(**batch).logits))
    finally:
        space.detach()


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("rank", [4, 3], ids="rank {}".format)
@pytest.mark.parametrize("directions", [1, 3], ids="{} directions".format)
def test_outputs_are_those_of_a_factor_for_every_layer(
    build, rank: int, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that does not divide 128 has no common tensor, and works as well."""
    probes = [Probe(i, sign * 1e-2) for i in range(directions) for sign in (1.0, -1.0)]
    expected = _logits(_space(build, torch.float64, rank), probes)
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    space = _space(build, torch.float64, rank)
    assert bool(space._factors) == (rank == 4)
    assert torch.allclose(_logits(space, probes), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected[:ROWS], expected[ROWS : 2 * ROWS], rtol=1e-6)


def test_bases_are_the_same_in_wider_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _space(tiny_opt, torch.bfloat16, 4)
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    space = _space(tiny_opt, torch.bfloat16, 4)
    for name in expected.factored:
        assert torch.equal(space.basis(name), expected.basis(name))
        assert space._bases.wide(name).shape[1] == width_of(4) == 8
        assert not space._bases.wide(name)[:, 4:].any()


def test_a_fold_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _space(tiny_opt, torch.bfloat16, 4)
    expected.fold(2, {})
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    space = _space(tiny_opt, torch.bfloat16, 4)
    space.fold(2, {})
    for mine, theirs in zip(space.sites, expected.sites, strict=True):
        assert torch.equal(mine.parameter, theirs.parameter), mine.name


def test_a_pass_without_probes_reads_norms_that_were_written_after_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    space = _space(tiny_llama, torch.float64, 4)
    space.attach()
    batch = {name: value for name, value in causal_batch(ROWS).items() if name != "labels"}
    with torch.no_grad():
        space.model(**batch)
        norm = space.model.model.norm
        ones = torch.ones(1, 1, len(norm.weight), dtype=torch.float64)
        before = norm(ones)
        norm.weight.add_(1.0)
        after = norm(ones)
    space.detach()
    torch.testing.assert_close(after - before, torch.ones_like(after), rtol=1e-4, atol=1e-4)


def _coordinates_after_a_run(build) -> dict[str, Tensor]:
    """Coordinates and weights after twenty steps, with a fold in between."""
    model = seeded(build, torch.float64, num_hidden_layers=1)
    zo = ZerothOrder(model, "low_rank", batched=True, fold_steps=12, seed=3, eps=1e-2)
    optimizer, checks = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=1e-3)), LossChecks()
    batch = causal_batch(ROWS)
    for _ in range(20):
        zo.estimate(loss_of(model, batch, checks=checks))
        optimizer.step()
    found = {name: coordinate.detach().clone() for name, coordinate in zo.subspace.coordinates.items()}
    zo.finish()
    return found | {f"{name} as a weight": p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_run_is_that_of_a_cpu(build, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what the losses of transformers leave, which are float32 whatever the model is."""
    expected = _coordinates_after_a_run(build)
    monkeypatch.setattr(draws, "is_launched", lambda device: True)
    monkeypatch.setattr(per_group, "_BROADCASTS", {})
    found = _coordinates_after_a_run(build)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=2e-6), name
    assert all(value.any() for name, value in found.items() if not name.endswith("as a weight"))
