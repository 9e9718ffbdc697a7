"""W + √(mn)/r · U·S·Vᵀ: the bases of a core."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, seeded, tiny_gpt2, tiny_llama, weights_of
from tests.parallel.launch import Running
from tests.subspaces.helpers import basis, left, move_off_the_origin, sgd
from zo_hf.directions import GAUSSIAN
from zo_hf.engine import ZerothOrder
from zo_hf.estimators.probe import Probe
from zo_hf.rng import Purpose, Stream, draw_slice
from zo_hf.subspaces import Core, LowRank


def matrix(m: int = 40, n: int = 30, dtype: torch.dtype = torch.float32) -> nn.Module:
    return seeded(lambda: nn.Linear(n, m, bias=False), dtype)


def bases(space: Core, name: str = "weight") -> tuple[Tensor, Tensor]:
    """U and V, without their factor."""
    m, n = space.factored[name].matrix_shape
    return space._left_bases[name] * space.rank / (m * n) ** 0.5, space.basis(name)


def test_the_bases_are_orthonormal() -> None:
    for rank in (1, 5, 29):
        for q in bases(Core(matrix(dtype=torch.float64), rank=rank)):
            assert torch.allclose(q.t() @ q, torch.eye(rank, dtype=torch.float64), atol=1e-12)


def test_the_bases_are_those_of_numpy_with_the_signs_of_a_haar_distribution() -> None:
    """Q of the same normal draws, its columns turned so that R has a positive diagonal; and as the suites draw them."""
    space = Core(matrix(dtype=torch.float64), rank=6, seed=3)
    stream = Stream(3, 0, purpose=Purpose.BASIS)
    for found, name, rows in zip(bases(space), ("weight/left", "weight"), (40, 30), strict=True):
        noise = draw_slice(stream, name, 0, rows * 6, GAUSSIAN).view(rows, 6).double().numpy()
        q, r = np.linalg.qr(noise)
        assert np.allclose(found.numpy(), q * np.sign(np.diagonal(r)), atol=1e-12)
    assert torch.allclose(basis(space, "weight"), space.basis("weight"), atol=1e-12)
    core = torch.randn(6, 6, dtype=torch.float64)
    assert torch.allclose(left(space, "weight", core), space._left_bases["weight"] @ core, atol=1e-12)


def test_first_entries_have_either_sign() -> None:
    """Householder's Q alone would have one sign there, whatever is decomposed."""
    firsts = torch.tensor([[q[0, 0] for q in bases(Core(matrix(8, 6), rank=2, seed=seed))] for seed in range(400)])
    assert ((firsts > 0).double().mean(0) - 0.5).abs().max() < 4 * 0.5 / 400**0.5
    # Uniform on the sphere: an entry has mean square 1/m, or 1/n.
    mean_square = firsts.square().mean(0)
    assert mean_square[0] == pytest.approx(1 / 8, rel=0.25) and mean_square[1] == pytest.approx(1 / 6, rel=0.25)


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_an_entry_of_the_direction_has_unit_variance(rank: int, distribution: str) -> None:
    model = nn.Linear(60, 80, bias=False)
    weight = model.weight.detach()
    squares, means = [], []
    for seed in range(60):
        zo = ZerothOrder(model, Core(model, rank=rank, seed=seed), eps=1.0, direction=distribution, seed=seed)
        with zo.subspace.at((Probe(0, 1.0),), zo._stream, zo.distribution), torch.no_grad():
            draw = model(torch.eye(60)).t() - weight
        zo.subspace.detach()
        squares.append(draw.double().square().mean())
        means.append(draw.double().mean())
    # ‖√(mn)/r·U·Z·Vᵀ‖² = mn/r²·‖Z‖², whose error is that of r² squares.
    assert torch.stack(squares).mean().item() == pytest.approx(1.0, abs=4 * (2 / rank**2 / 60) ** 0.5 + 1e-5)
    assert abs(torch.stack(means).mean()) < 0.1


def test_bases_are_drawn_again_after_each_fold_and_not_before() -> None:
    model = matrix()
    zo = ZerothOrder(model, Core(model, rank=4, fold_steps=3, seed=5), seed=5)
    optimizer = sgd(zo, lr=1e-3)
    seen = []
    for _ in range(7):
        seen.append([q.clone() for q in bases(zo.subspace)])
        zo.estimate(lambda: model(torch.ones(2, 30)).sin().sum())
        optimizer.step()
    for step, pair in enumerate(seen):
        for now, first, before in zip(pair, seen[step - step % 3], seen[step - 1], strict=True):
            assert torch.equal(now, first)
            assert torch.equal(now, before) == (step % 3 != 0)
    again = Core(matrix(), rank=4, seed=5)
    again.draw_bases(6)
    assert all(torch.equal(a, b) for a, b in zip(bases(again), seen[6], strict=True))


SCRIPT = """
import sys
import torch
torch.set_num_threads(int(sys.argv[1]))
from torch import nn
from zo_hf.subspaces import Core
with torch.no_grad():
    space = Core(nn.Linear(700, 900, bias=False), rank=64, seed=1)
threads = torch.get_num_threads()
torch.save([space._left_bases["weight"], space.basis("weight")], sys.argv[2])
assert threads == int(sys.argv[1])
"""


@pytest.mark.slow
def test_bases_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    for threads in (1, 2, 4):
        process = Running(script, tmp_path / f"{threads}.log", threads, tmp_path / f"{threads}.pt")
        assert process.wait(60) == 0, process.said()
    one, *others = (torch.load(tmp_path / f"{threads}.pt") for threads in (1, 2, 4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_a_fold_keeps_the_function_and_is_what_a_checkpoint_holds(build, dtype: torch.dtype) -> None:
    model = seeded(build, dtype)
    space = Core(model, rank=6)
    before = weights_of(model)
    move_off_the_origin(space, 0.05)
    expected = {n: left(space, n, space.coordinates[n].detach()) @ basis(space, n).t() for n in space.factored}
    folded = space.folded_state_dict(9, {})
    space.fold(9, {})
    assert_same_bits(folded, weights_of(model))
    for name, change in expected.items():
        site = space.factored[name]
        moved = site.as_matrix(site.parameter).double() - site.as_matrix(before[name]).double()
        tolerance = (
            1e-6
            if dtype == torch.float32
            else 2**-7 * float(site.parameter.detach().abs().max()) + 2**-8 * float(change.abs().max())
        )
        assert (moved - change).abs().max() <= tolerance, name
    assert not any(c.any() for c in space.coordinates.values())


def test_it_has_few_coordinates() -> None:
    """r² for a matrix that is larger, all of a smaller one, and a parameter of one dimension as a whole."""
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 7))
    shapes = {name: tuple(c.shape) for name, c in Core(model, rank=8).coordinates.items()}
    assert shapes == {"0.weight": (8, 8), "0.bias": (40,), "1.weight": (7, 40), "1.bias": (7,)}
    assert issubclass(Core, LowRank) and Core.default_eps == LowRank.default_eps
