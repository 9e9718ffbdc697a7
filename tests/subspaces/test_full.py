"""All weights with dense directions: MeZO, against a second and deliberately plain implementation of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, causal_batch, seeded, tiny_llama, tiny_opt, weights_of
from tests.subspaces.helpers import exact_loss
from zo_hf.directions import GAUSSIAN, RADEMACHER, Elementwise
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Stream, draw_slice
from zo_hf.rules import SeededSGD
from zo_hf.subspaces import Full
from zo_hf.subspaces import full as full_module


def plain_mezo(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    eps: float,
    directions: int = 1,
    distribution: Elementwise = GAUSSIAN,
    seed: int = 0,
) -> list[float]:
    """Algorithm 1 of the MeZO paper with q directions: perturb all weights in place, measure, restore, descend."""

    def perturb(step: int, index: int, scale: float) -> None:
        for name, parameter in model.named_parameters():
            z = draw_slice(Stream(seed, step, index), name, 0, parameter.numel(), distribution)
            parameter += scale * z.view(parameter.shape).to(parameter.dtype)

    found = []
    with torch.no_grad():
        for step in range(steps):
            start = [parameter.clone() for parameter in model.parameters()]
            projected = []
            for index in range(directions):
                measured = []
                for sign in (1, -1):
                    perturb(step, index, sign * eps)
                    measured.append(loss().item())
                    for parameter, value in zip(model.parameters(), start, strict=True):
                        parameter.copy_(value)
                projected.append((measured[0] - measured[1]) / (2 * eps))
            for index, c in enumerate(projected):
                perturb(step, index, -lr * c / directions)
            found += projected
    return found


def zo_full(model: nn.Module, lr: float, **kwargs) -> tuple[ZerothOrder, SeededSGD]:
    zo = ZerothOrder(model, "full", **kwargs)
    return zo, zo.prepare(SeededSGD(zo.coordinates(), zo.subspace, lr=lr))


@pytest.mark.parametrize(
    ("build", "dtype", "directions", "distribution", "tolerance"),
    [
        (tiny_opt, torch.float64, 3, RADEMACHER, 1e-10),
        (tiny_opt, torch.float32, 1, GAUSSIAN, 2e-5),
        (tiny_llama, torch.float64, 1, RADEMACHER, 1e-5),  # its norms compute in float32
        (tiny_llama, torch.float32, 3, GAUSSIAN, 2e-5),
    ],
    ids=["opt float64 q=3", "opt float32", "llama float64", "llama float32 q=3"],
)
def test_follows_plain_mezo(
    build, dtype: torch.dtype, directions: int, distribution: Elementwise, tolerance: float
) -> None:
    """The same projected gradients and weights over 30 directions, to rounding."""
    ours, theirs = (seeded(build, dtype, num_hidden_layers=1) for _ in range(2))
    batch = causal_batch(2, 6)
    lr, eps, steps = 5e-4, 1e-2, 30 // directions
    zo, optimizer = zo_full(
        ours, lr, eps=eps, num_directions=directions, direction=distribution.name, batched_probes=False
    )
    found: list[float] = []
    for _ in range(steps):
        found += zo.estimate(lambda: exact_loss(ours, batch)).projected_gradients
        optimizer.step()
    zo.finish()
    expected = plain_mezo(theirs, lambda: exact_loss(theirs, batch), steps, lr, eps, directions, distribution)
    start = weights_of(seeded(build, dtype, num_hidden_layers=1))
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=100 * tolerance)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=0, atol=tolerance), name
        assert (value - start[name]).abs().max() > 100 * tolerance, "the run is too short to tell"


def test_embedding_rows_move_by_their_rows_of_the_direction() -> None:
    """Of a large table only the rows in the batch are drawn, repeated ones once."""
    model = nn.Embedding(50, 10)
    space = Full(model, seed=5)
    space.attach()
    ids = torch.tensor([[3, 3, 49], [0, 3, 7]])
    z = draw_slice(Stream(5, 2), "weight", 0, 500, GAUSSIAN).view(50, 10)
    with space.at((Probe(0, 0.1),), lambda index: Stream(5, 2, index), GAUSSIAN):
        moved = model(ids)
    assert torch.allclose(moved, (model.weight + 0.1 * z)[ids], atol=1e-6)
    assert torch.equal(model(ids), model.weight[ids])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16"])
def test_tiles_of_a_large_weight_are_seamless(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe and update work a tile at a time; with tiny tiles, of which none ends at a block's edge, nothing changes."""

    def run() -> tuple[tuple[float, ...], dict[str, Tensor]]:
        model = seeded(lambda: nn.Sequential(nn.Linear(13, 11), nn.Linear(11, 5)), dtype)
        zo, optimizer = zo_full(model, 1e-2, num_directions=2, seed=1)
        estimate = zo.estimate(lambda: model(torch.ones(3, 13, dtype=dtype)).square().sum())
        optimizer.step()
        zo.finish()
        return estimate.projected_gradients, weights_of(model)

    whole = run()
    monkeypatch.setattr(full_module, "TILE", 30)
    tiled = run()
    assert tiled[0] == pytest.approx(whole[0], rel=1e-9)
    for name, value in whole[1].items():
        assert torch.allclose(tiled[1][name], value, rtol=1e-9)


# SeededSGD.


def pending(model: nn.Module, streams: list[tuple[Stream, float]], lr: float, weight_decay: float = 0.0) -> SeededSGD:
    space = Full(model)
    space.pending, space.distribution = streams, GAUSSIAN
    return SeededSGD(model.parameters(), space, lr=lr, weight_decay=weight_decay)


def test_one_pass_for_q_directions_equals_q_passes() -> None:
    one, many = (seeded(tiny_opt) for _ in range(2))
    streams = [(Stream(0, 3, index), c) for index, c in enumerate((0.7, -1.3, 0.2, 2.0))]
    pending(one, streams, 1e-2).step()
    for entry in streams:
        pending(many, [entry], 1e-2).step()
    for (name, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7), name


def test_an_update_is_applied_once() -> None:
    """A second `step()` without an estimate writes nothing, weight decay included."""
    model = seeded(tiny_opt)
    optimizer = pending(model, [(Stream(0), 1.0)], 1e-2, weight_decay=0.1)
    before = weights_of(model)
    optimizer.step()
    after = weights_of(model)
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    optimizer.step()
    assert_same_bits(weights_of(model), after)


def test_tied_weights_are_updated_once() -> None:
    """A shared embedding and head are one tensor with one direction."""
    model = seeded(tiny_opt)
    before = model.lm_head.weight.detach().clone()
    pending(model, [(Stream(0), 1.0)], 1e-2).step()
    z = draw_slice(Stream(0), "model.decoder.embed_tokens.weight", 0, before.numel(), GAUSSIAN).view(before.shape)
    assert torch.allclose(model.lm_head.weight, before - 1e-2 * z, atol=1e-7)


def test_weight_decay_is_decoupled_and_groups_are_honoured() -> None:
    """θ ← (1 - ηλ)·θ - η·c·z with η and λ of the parameter's own group, under a schedule."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.float64)
    zo = ZerothOrder(model, "full", seed=4)
    groups = [
        {"params": [model[0].weight], "lr": 1e-2, "weight_decay": 0.5},
        {"params": [model[0].bias, model[1].weight]},
        {"params": [model[1].bias], "lr": 0.0, "weight_decay": 0.3},
    ]
    optimizer = zo.prepare(SeededSGD(groups, zo.subspace, lr=1e-3, weight_decay=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = {"0.weight": (1e-2, 0.5), "0.bias": (1e-3, 0.1), "1.weight": (1e-3, 0.1), "1.bias": (0.0, 0.3)}
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        (c,) = zo.estimate(lambda: model(x).square().sum()).projected_gradients
        optimizer.step()
        schedule.step()
        for name, value in expected.items():
            lr, decay = rates[name][0] * 0.5**step, rates[name][1]
            z = draw_slice(Stream(4, step), name, 0, value.numel(), GAUSSIAN).view(value.shape).double()
            expected[name] = (1 - lr * decay) * value - lr * c * z
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-9, atol=1e-12), name


def test_clipping_scales_the_pending_update() -> None:
    """√d·√Σc², which is the norm itself for one Rademacher direction."""
    model = seeded(tiny_opt)
    zo = ZerothOrder(model, "full", direction="rademacher")
    zo.subspace.write_gradient([3.0], lambda index: Stream(0, 0, index), RADEMACHER)
    d = sum(p.numel() for p in model.parameters())
    assert zo.subspace.clip_gradient(1.0) == pytest.approx(3.0 * d**0.5)
    assert zo.subspace.pending[0][1] == pytest.approx(d**-0.5)
    assert zo.subspace.clip_gradient(10.0) == pytest.approx(1.0)
    assert zo.subspace.pending[0][1] == pytest.approx(d**-0.5)


# Half precision.


def regression(dtype: torch.dtype) -> tuple[nn.Linear, Callable[[nn.Module], Tensor]]:
    """A linear layer whose best weights are some ten ulps of bfloat16 away from where it starts."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 2, bias=False)
    model.weight.data.fill_(1.5)
    best = 1.5 + 0.08 * torch.randn(2, 4, generator=generator)
    x = torch.randn(128, 4, generator=generator).to(torch.bfloat16).float()
    target = x @ best.t()
    return model.to(dtype), lambda layer: (layer(x.to(dtype)).float() - target).square().mean()


def test_small_updates_survive_bf16_weights() -> None:
    """Steps far below half an ulp: bf16 learns as float32 does, while rounding to nearest never moves a bit."""
    lr, eps, steps = 3e-3, 1e-2, 700
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, loss = regression(dtype)
        start = loss(model).item()
        zo, optimizer = zo_full(model, lr, eps=eps, batched_probes=False)
        sizes = []
        for _ in range(steps):
            (c,) = zo.estimate(lambda model=model, loss=loss: loss(model)).projected_gradients
            sizes.append(abs(lr * c))
            optimizer.step()
        zo.finish()
        losses[dtype] = loss(model).item() / start
        assert max(sizes) < half_ulp / 2 and sum(sizes) / steps < half_ulp / 10
    assert losses[torch.float32] < 0.05
    assert losses[torch.bfloat16] < 0.1

    model, loss = regression(torch.bfloat16)
    before = model.weight.detach().clone()
    plain_mezo(model, lambda: loss(model), 50, lr / 4, eps)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_probes_are_not_rounded_away(dtype: torch.dtype) -> None:
    """ε·z is far below an ulp of W, and yet the projected gradient agrees with float32's.

    The inputs cancel the weights, so that the output is the perturbation alone and is not rounded to an ulp of W.
    """
    eps = torch.finfo(dtype).eps / 100
    x = torch.eye(8) - torch.eye(8).roll(1, 0)
    found = {}
    for kind in (dtype, torch.float32):
        model = nn.Linear(8, 8, bias=False).to(kind)
        model.weight.data.fill_(1.0)
        weights = torch.linspace(-1, 2, 64).view(8, 8)
        zo = ZerothOrder(model, "full", eps=eps, num_directions=30, batched_probes=False)
        estimate = zo.estimate(lambda m=model, w=weights, k=kind: (m(x.to(k)).float() * w).sum())
        found[kind] = torch.tensor(estimate.projected_gradients)
    assert found[torch.float32].std() > 1
    assert torch.allclose(found[dtype], found[torch.float32], rtol=0, atol=0.1)
