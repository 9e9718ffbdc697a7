"""What holds for every distribution whose directions depend on more than one element: the same z, however it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_opt, weights_of
from tests.subspaces.helpers import ARE_OFFSETS, batch_for, draws_for, loss_of, prepared, sgd
from tests.subspaces.test_batched import both
from tests.trainer.runs import SaveAt, logged, trained, with_lora
from zo_hf.directions import DISTRIBUTIONS, ELEMENTWISE, Distribution, gram
from zo_hf.directions.options import DirectionOptions
from zo_hf.engine import ZerothOrder
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.rng import NoiseLayout, Stream
from zo_hf.subspaces import SUBSPACES, Adapter, Full
from zo_hf.trajectory import replay

OTHERS = [name for name in DISTRIBUTIONS if name not in ELEMENTWISE]
EVERY_OTHER = pytest.mark.parametrize("distribution", OTHERS)
STREAM = Stream(seed=3, step=4, direction=1)


class Odd(nn.Module):
    """Sizes of which none fills whole blocks; `order` says which layer is registered first."""

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        layers = {"embed": nn.Embedding(9, 7), "hidden": nn.Linear(7, 13), "out": nn.Linear(13, 3, bias=False)}
        for name in list(layers)[::order]:
            self.add_module(name, layers[name])

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.hidden(self.embed(ids)).tanh())


def drawn(name: str, model: nn.Module, q: int = 3) -> tuple[Distribution, Full]:
    space = Full(model)
    distribution = DISTRIBUTIONS[name](space.direction_context(q, DirectionOptions(active_layers=0.5)))
    distribution.begin()
    return distribution, space


def whole(distribution: Distribution, space: Full, stream: Stream = STREAM) -> dict[str, Tensor]:
    coordinates = space.coordinates
    return {
        name: distribution.draw_slice(stream, name, 0, c.detach().view(-1)).view(c.shape)
        for name, c in coordinates.items()
    }


@EVERY_OTHER
def test_slices_rows_and_layouts_are_parts_of_one_direction(distribution: str) -> None:
    drawer, space = drawn(distribution, seeded(Odd))
    z = whole(drawer, space)
    layout = NoiseLayout({name: c.shape for name, c in space.coordinates.items()}, torch.device("cpu"))
    assert_same_bits(layout.views(drawer.draw_layout(STREAM, layout, space.coordinates)), z)
    for name, coordinate in space.coordinates.items():
        flat = coordinate.detach().view(-1)
        for start, stop in ((0, 5), (3, 7), (len(flat) - 2, len(flat))):
            part = drawer.draw_slice(STREAM, name, start, flat[start:stop])
            assert torch.equal(part, z[name].view(-1)[start:stop])
        if coordinate.ndim == 2:
            rows = torch.tensor([[2, 0], [2, 1]])
            assert torch.equal(drawer.draw_rows(STREAM, name, rows, coordinate.detach()), z[name][rows])
    assert any(z[name].count_nonzero() for name in z)


@EVERY_OTHER
def test_the_order_of_the_tensors_does_not_matter(distribution: str) -> None:
    model, other = seeded(Odd), Odd(order=-1)
    other.load_state_dict(model.state_dict())
    ours, theirs = whole(*drawn(distribution, model)), whole(*drawn(distribution, other))
    assert list(ours) != list(theirs)
    assert_same_bits(theirs, ours)


@EVERY_OTHER
def test_seed_step_and_direction_each_give_other_directions(distribution: str) -> None:
    drawer, space = drawn(distribution, seeded(lambda: nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))))
    streams = [STREAM, Stream(4, 4, 1), Stream(3, 5, 1), Stream(3, 4, 2)]
    z = [torch.cat([t.flatten() for t in whole(drawer, space, stream).values()]) for stream in streams]
    again = torch.cat([t.flatten() for t in whole(drawer, space, STREAM).values()])
    assert torch.equal(z[0], again)
    for i, a in enumerate(z):
        for b in z[:i]:
            assert abs(torch.cosine_similarity(a, b, dim=0)) < 0.2


@EVERY_OTHER
def test_threads_and_tiles_do_not_matter_and_no_global_generator_is_touched(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 5)))
    state, threads, found = torch.get_rng_state(), torch.get_num_threads(), []
    try:
        for count, tile in ((1, 1 << 20), (3, 1 << 20), (1, 1)):
            torch.set_num_threads(count)
            monkeypatch.setattr(gram, "TILE", tile)
            found.append(whole(*drawn(distribution, model)))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("subspace", ["full", "adapter", "low_rank"])
@EVERY_OTHER
def test_batched_probes_give_the_losses_of_sequential_ones(subspace: str, distribution: str) -> None:
    if not draws_for(distribution, subspace):
        return
    model = prepared(subspace, seeded(tiny_opt))
    loss = loss_of(model, batch_for(model))
    sequential, batched = both(model, subspace, loss, 3, eps=0.02, direction=distribution)
    assert torch.allclose(sequential, batched, rtol=0, atol=2e-6)
    assert (sequential[::2] - sequential[1::2]).abs().min() > 1e-6


@EVERY_OTHER
def test_ranks_that_share_out_directions_probe_those_of_one_process(distribution: str) -> None:
    losses = {}
    for directions, rank in ((1, 0), (2, 0), (2, 1)):
        model = seeded(tiny_opt)
        ranks = Ranks(Grid(directions=directions, rank=rank))
        zo = ZerothOrder(model, "full", num_directions=4, direction=distribution, batched_probes=False, ranks=ranks)
        losses[directions, rank] = zo.probe(loss_of(model, causal_batch()))
    assert torch.equal(losses[1, 0][[0, 1, 4, 5]], losses[2, 0])
    assert torch.equal(losses[1, 0][[2, 3, 6, 7]], losses[2, 1])


@EVERY_OTHER
def test_a_regression_converges(distribution: str) -> None:
    model, teacher = seeded(Odd), seeded(Odd, seed=1)
    ids = torch.arange(9)
    target = teacher(ids).detach()

    def loss() -> Tensor:
        return (model(ids) - target).square().mean()

    before = loss().item()
    active = {"active_layers": 0.5} if "active_layers" in DISTRIBUTIONS[distribution].uses else {}
    zo = ZerothOrder(model, Adapter(model), num_directions=2, direction=distribution, **active)
    optimizer = sgd(zo, lr=1e-1)
    for _ in range(150):
        zo.estimate(loss)
        optimizer.step()
    zo.finish()
    # A quarter of the weights cannot learn all of it.
    assert loss().item() < (0.75 if distribution == "sparse" else 0.1) * before


# Runs.


def build(subspace: str) -> nn.Module:
    layers = 2 if subspace == "adapter" else 1  # to choose among, where nothing else moves
    model = seeded(tiny_opt, num_hidden_layers=layers)
    return with_lora(model) if subspace == "adapter" else model


RUNS = [(subspace, distribution) for subspace in ("full", "adapter") for distribution in OTHERS]


@pytest.mark.parametrize(("subspace", "distribution"), [*RUNS, ("low_rank", "layers"), ("low_rank", "orthogonal")])
def test_resuming_and_replaying_a_run_give_its_bits(tmp_path: Path, subspace: str, distribution: str) -> None:
    """From a checkpoint in the middle, where the weights are no longer those that the run began with."""
    options = {"zo_subspace": subspace, "zo_direction": distribution, "zo_num_directions": 2, "max_steps": 4}
    options |= {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 50.0}
    if distribution == "layers":
        options["zo_active_layers"] = 0.5
    if subspace == "adapter":
        options["zo_target_modules"] = ".*lora_[AB].*"
    more = {"callbacks": [SaveAt(2)]}
    run = trained(tmp_path / "run", build(subspace), more=more, **options)
    start = str(tmp_path / "run" / "checkpoint-2")
    resumed = trained(tmp_path / "resumed", build(subspace), resume=start, **options)
    assert_same_bits(weights_of(resumed.model), weights_of(run.model))
    assert logged(resumed, "loss")[2:] == logged(run, "loss")[2:]
    assert_same_bits(weights_of(replay(build(subspace), tmp_path / "resumed")), weights_of(run.model))


# What is refused.


@pytest.mark.parametrize("subspace", [name for name in ARE_OFFSETS if name != "scales"])
def test_small_weights_are_those_of_weights(subspace: str) -> None:
    with pytest.raises(
        ValueError, match=r"^zo_direction='sparse' .* this zo_subspace are not weights; use zo_subspace='full'"
    ):
        ZerothOrder(seeded(tiny_opt), SUBSPACES[subspace](seeded(tiny_opt)), direction="sparse")


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^zo_direction='spiral' is unknown; choose one of gaussian, rademacher, sphere"
    ):
        ZerothOrder(seeded(tiny_opt), "full", direction="spiral")
