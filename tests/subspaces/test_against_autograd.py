"""What the probes find, against autograd's gradient of the same loss in the same coordinates."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from tests.conftest import seeded, tiny_llama, tiny_opt
from tests.subspaces.helpers import (
    MODELS,
    UNQUANTISED,
    batch_for,
    direction,
    draws_for,
    exact_loss,
    float64_throughout,
    gradient_in_coordinates,
    move_off_the_origin,
    plain,
    prepared,
)
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.engine import ZerothOrder
from zo_hf.subspaces import SUBSPACES

# The fused experts need aligned half-precision weights; the plain ones compute the same.
BUILDS = {**MODELS, "llama tied": partial(tiny_llama, tie_word_embeddings=True)}
BUILDS["opt untied"] = partial(tiny_opt, tie_word_embeddings=False)
BUILDS["mixtral"] = partial(MODELS["mixtral"], experts_implementation="eager")


# Every architecture in every subspace; every distribution in every subspace, and on stacked experts too.
PROBED = [(name, build, "gaussian") for name in SUBSPACES for build in BUILDS]
PROBED += [
    (name, build, distribution)
    for name in SUBSPACES
    for build in (("opt", "mixtral") if name in ("low_rank", "full") else ("opt",))
    for distribution in DISTRIBUTIONS
    if distribution != "gaussian" and draws_for(distribution, name)
]


@pytest.mark.parametrize(("subspace", "architecture", "distribution"), sorted(PROBED))
def test_projected_gradient_is_the_directional_derivative(
    subspace: str, architecture: str, distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along each of several directions, in float64, to 1e-4: every layer enters the forward with its own noise."""
    with float64_throughout(monkeypatch):
        # Weights larger than at initialization, so that attention and norms are not linear in what is tested.
        model = prepared(subspace, seeded(BUILDS[architecture], torch.float64, initializer_range=0.2))
        batch = batch_for(model)
        zo = ZerothOrder(
            model, subspace, eps=1e-6, num_directions=3, direction=distribution, batched_probes=False, seed=17
        )
        move_off_the_origin(zo.subspace)
        estimate = zo.estimate(lambda: exact_loss(model, batch))
        zo.subspace.detach()
        reference = plain(model) if subspace == "scales" else model

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return exact_loss(lambda **inputs: functional_call(reference, parameters, kwargs=inputs), batch)

        gradient = gradient_in_coordinates(zo.subspace, loss)
    norm = sum(g.square().sum() for g in gradient.values()) ** 0.5
    assert norm > 0.01
    for index, found in enumerate(estimate.projected_gradients):
        z = direction(zo.subspace, index=index, distribution=zo.distribution)
        expected = sum((gradient[name] * z[name]).sum() for name in gradient)
        assert found == pytest.approx(expected.item(), rel=1e-4, abs=1e-5 * norm.item())


class SmallNet(nn.Module):
    """A few coordinates in every subspace: matrices and a vector, with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.norm = nn.LayerNorm(2, elementwise_affine=False)
        self.out = nn.Linear(2, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.embed(ids)).tanh())


def small_net(subspace: str) -> tuple[nn.Module, object]:
    model = prepared(subspace, seeded(SmallNet, torch.float64), ["out"])
    ids = torch.tensor([0, 1, 2, 2, 1, 0])
    target = torch.linspace(-2, 3, 18, dtype=torch.float64).view(6, 3)
    return model, lambda call: (call(ids) - target).square().mean()


@pytest.mark.parametrize(
    "distribution", ["gaussian", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rademacher", "sphere"))]
)
def test_mean_estimate_is_the_gradient(distribution: str) -> None:
    """Over at least 100·d directions as drawn: cosine ≥ 0.99 with ∇L, and no coordinate is biased.

    The second by Student's statistic of each coordinate: none beyond five, their mean square about one. Subspaces and
    losses are those of `tests/unbiased`, whose directions are not drawn.
    """
    model, loss_of = small_net("low_rank")
    space = SUBSPACES["low_rank"](model, seed=3, rank=1)
    count = 100 * max(space.dimension, 12)  # of few coordinates more, for a cosine varies more among them
    zo = ZerothOrder(
        model, space, eps=1e-5, num_directions=count, direction=distribution, batched_probes=False, seed=3
    )
    estimate = zo.estimate(lambda: loss_of(model))
    space.detach()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(lambda *args, **kwargs: functional_call(model, parameters, args, kwargs))

    gradient = _flat(gradient_in_coordinates(space, loss))
    z = torch.stack([_flat(direction(space, index=i, distribution=zo.distribution)) for i in range(count)])
    samples = torch.tensor(estimate.projected_gradients, dtype=torch.float64)[:, None] * z
    mean = samples.mean(0)
    assert torch.cosine_similarity(mean, gradient, dim=0) >= 0.99
    written = _flat({name: c.grad for name, c in space.coordinates.items()})
    assert torch.allclose(written, mean, rtol=1e-9, atol=1e-12)
    student = (mean - gradient) / (samples.std(0) / count**0.5)
    assert student.abs().max() < 5
    # Coordinates' errors are nearly independent, so that this is χ²/d within five of its standard deviations.
    assert abs(student.square().mean() - 1) < 5 * (2 / len(student)) ** 0.5


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


class EveryKindOfParameter(nn.Module):
    """Convolutions, an embedding, a stack of matrices, a Conv1D, several parameters in one module, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.mix = nn.Conv1d(3, 2, 3, groups=1)
        self.stack = Stack()
        self.conv1d = Conv1D(4, 20)
        self.scale = Scale()
        self.bilinear = nn.Bilinear(4, 4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, None]  # (batch, 1, 8, 12)
        x = self.norm(self.conv(x)).tanh().mean(2)  # (batch, 3, 10)
        x = self.mix(torch.cat((x, x.flip(2)[..., :2]), 2))  # (batch, 2, 10)
        x = self.conv1d(self.stack(x).flatten(1)).sin()
        return self.scale(self.bilinear(x, x.flip(1)))


class Stack(nn.Module):
    """Two matrices in one parameter, like the experts of a mixture, and a bias beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(2, 10, 10) / 3)
        self.bias = nn.Parameter(torch.randn(2, 10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bij,ikj->bik", x, self.matrices) + self.bias


class Scale(nn.Module):
    """A parameter without dimensions, like CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("subspace", UNQUANTISED)
def test_every_kind_of_parameter_is_probed(subspace: str) -> None:
    """The projected gradient along a direction that moves one tensor alone, for each tensor in turn.

    "adapter" moves every trainable tensor, so that here it needs no PEFT.
    """
    ids = torch.randint(0, 7, (5, 8), generator=torch.Generator().manual_seed(0))
    names = [name for name, p in EveryKindOfParameter().named_parameters() if subspace != "norms" or p.ndim < 2]
    for name in names:
        model = seeded(EveryKindOfParameter, torch.float64)
        zo = ZerothOrder(
            model, SUBSPACES[subspace](model, target_modules=[name]), eps=1e-5, num_directions=2, batched_probes=False
        )
        assert list(zo.subspace.coordinates) == [name]
        estimate = zo.estimate(lambda model=model: model(ids).square().mean())
        zo.subspace.detach()

        def loss(parameters: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return functional_call(model, parameters, (ids,)).square().mean()

        gradient = gradient_in_coordinates(zo.subspace, loss)[name]
        for index, found in enumerate(estimate.projected_gradients):
            expected = (gradient * direction(zo.subspace, index=index)[name]).sum().item()
            assert abs(expected) > 1e-6, name
            assert found == pytest.approx(expected, rel=1e-4), name
