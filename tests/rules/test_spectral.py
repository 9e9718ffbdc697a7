"""ZO-Muon and ZO-MOPI: singular directions of the estimate, all of them or the leading ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_bits, seeded
from tests.rules.helpers import engine, estimate_written_out, gradients, linear_task, steps
from zo_hf.rules.muon import matrix_sign

SHAPES = [(32, 4), (4, 32), (8, 8), (300, 16), (1, 5), (5, 1)]


def random_matrix(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def polar(matrix: Tensor) -> Tensor:
    """U·Vᵀ by a singular value decomposition in float64."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


def spectral(
    rule: str, shape: tuple[int, int] = (12, 8), rank: int = 2, subspace: str = "low_rank", **options
) -> tuple:
    """A rule, its engine and its optimizer, on one linear layer."""
    model = seeded(lambda: nn.Linear(shape[1], shape[0]))
    zo, optimizer = engine(model, rule, subspace=subspace, rank=rank, options=options)
    return zo.rule, zo, optimizer


# The matrix sign.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_singular_directions_are_kept_and_their_values_are_near_one(shape: tuple[int, int]) -> None:
    """Between 0.68 and 1.16 where the matrix, with a norm of 1, has one of at least 0.005; U and V are the SVD's."""
    for seed in range(5):
        matrix = random_matrix(shape, seed)
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert (values / values.norm()).min() > 0.005
        inner = u.t() @ matrix_sign(matrix).double() @ v.t()
        assert inner.diagonal().min() > 0.68 and inner.diagonal().max() < 1.16
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_direction_is_that_of_the_polar_factor(shape: tuple[int, int]) -> None:
    matrix = random_matrix(shape)
    cosine = torch.nn.functional.cosine_similarity(
        matrix_sign(matrix).double().flatten(), polar(matrix).flatten(), dim=0
    )
    assert cosine > 0.98


def test_signs_and_orders_of_rows_and_columns_and_the_scale_go_through() -> None:
    matrix = random_matrix((20, 6), dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    rows, columns = torch.randperm(20, generator=generator), torch.randperm(6, generator=generator)
    signs = torch.randint(0, 2, (20, 1), generator=generator) * 2.0 - 1
    moved = (signs * matrix)[rows][:, columns]
    expected = (signs * matrix_sign(matrix))[rows][:, columns]
    torch.testing.assert_close(matrix_sign(moved), expected)
    torch.testing.assert_close(matrix_sign(matrix.t()), matrix_sign(matrix).t())
    for scale in (1e-30, 1e30):
        torch.testing.assert_close(matrix_sign(matrix.float() * scale), matrix_sign(matrix.float()))


def test_nothing_has_no_sign() -> None:
    assert torch.equal(matrix_sign(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    """A QR decomposition of this size does depend on it."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            rule, zo, _ = spectral("power_iteration", (100, 90), rank=64, subspace="core", spectral_rank=64)
            for _ in range(2):
                zo.apply([1.0, -2.0, 0.5, 3.0], skipped=False)
            results.append(gradients(zo) | rule.state())
        finally:
            torch.set_num_threads(1)
    assert_same_bits(results[0], results[1])


# The rules.


@pytest.mark.parametrize("rule", ["muon", "power_iteration"])
@pytest.mark.parametrize("subspace", ["low_rank", "core"])
def test_every_tensor_takes_a_step_of_the_same_size(rule: str, subspace: str) -> None:
    """A root mean square of 1, within what the singular values of the iteration leave, at any scale of c."""
    for scale in (1e-12, 1.0, 1e12):
        zo, _ = engine(seeded(lambda: nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30))), rule, subspace=subspace)
        zo.apply([scale, -2 * scale, 0.3 * scale, scale], skipped=False)
        for name, gradient in gradients(zo).items():
            size = gradient.square().mean().sqrt().item()
            within = 0.25 if rule == "muon" and gradient.ndim == 2 else 1e-5
            assert size == pytest.approx(1.0, abs=within), name


def test_muon_is_the_sign_of_the_averaged_estimate() -> None:
    """Against an SVD of Σ β^(t-i)·(1-β)·ĝᵢ for matrices, and its own formula for vectors."""
    zo, optimizer = engine(
        seeded(lambda: nn.Linear(9, 11)), "muon", 0.0, options={"momentum": 0.7}, fold_steps=0, num_directions=2
    )
    mean: dict[str, Tensor] = {}
    for numbers in ([1.0, -0.5], [0.2, 2.0], [-1.0, 0.7]):
        for name, estimate in estimate_written_out(zo, [c / 2 for c in numbers]).items():
            mean[name] = 0.7 * mean.get(name, 0.0) + 0.3 * estimate
        zo.apply(numbers, skipped=False)
        found = gradients(zo)
        optimizer.step()
        expected = polar(mean["weight"]) * 11**0.5
        assert torch.cosine_similarity(found["weight"].double().flatten(), expected.flatten(), dim=0) > 0.98
        bias = mean["bias"] / mean["bias"].square().mean().sqrt()
        torch.testing.assert_close(found["bias"].double(), bias, rtol=1e-5, atol=1e-6)


def test_power_iteration_with_all_directions_tends_to_the_polar_factor() -> None:
    rule, *_ = spectral("power_iteration", spectral_rank=99)
    for shape in ((12, 5), (5, 12)):
        matrix, name = random_matrix(shape), f"of {shape}"
        for _ in range(150):
            step = rule.orthogonalized(name, matrix)
        torch.testing.assert_close(step.double(), polar(matrix) * 12**0.5, rtol=0, atol=1e-4)


def test_power_iteration_finds_the_leading_directions() -> None:
    """U_k·V_kᵀ of the SVD, times √(mn/k), after many sweeps over one matrix; half of them where none is given."""
    matrix = random_matrix((15, 8))
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    for k in (None, 1, 3):
        rule, *_ = spectral("power_iteration", spectral_rank=k)
        for _ in range(250):
            step = rule.orthogonalized("one", matrix)
        k = k or 4
        expected = u[:, :k] @ v[:k] * (15 * 8 / k) ** 0.5
        torch.testing.assert_close(step.double(), expected, rtol=0, atol=1e-3)


def test_a_sweep_is_the_formula_and_starts_where_the_last_one_ended() -> None:
    rule, *_ = spectral("power_iteration", spectral_rank=2)
    v = torch.eye(6, 2, dtype=torch.float64)
    for seed in range(3):
        matrix = random_matrix((10, 6), seed, torch.float64)
        v = torch.linalg.qr(matrix.t() @ (matrix @ v))[0]
        u = matrix @ v
        expected = u / u.norm(dim=0) @ v.t() * (60 / 2) ** 0.5
        torch.testing.assert_close(rule.orthogonalized("one", matrix), expected)


def test_a_matrix_of_less_rank_than_asked_for_has_no_step_in_the_rest() -> None:
    rule, *_ = spectral("power_iteration", spectral_rank=3)
    matrix = torch.outer(torch.arange(1.0, 8.0), torch.tensor([1.0, -1.0, 2.0, 0.5]))
    for _ in range(5):
        step = rule.orthogonalized("one", matrix)
    expected = matrix / matrix.norm() * (28 / 3) ** 0.5
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-5)
    assert torch.equal(rule.orthogonalized("other", torch.zeros(5, 4)), torch.zeros(5, 4))


@pytest.mark.parametrize("rule", ["muon", "power_iteration"])
@pytest.mark.parametrize("at_fold", ["carry", "reset"])
def test_a_fold_carries_or_resets_the_momentum(rule: str, at_fold: str) -> None:
    model, loss = linear_task()
    options = {"momentum": 0.9, "momentum_at_fold": at_fold}
    zo, optimizer = engine(model, rule, 1e-3, options=options, fold_steps=3)
    steps(zo, optimizer, loss, 2)
    assert {f"momentum/{name}" for name in zo.subspace.coordinates} <= zo.rule.state().keys()
    zo.estimate(loss)
    last = zo.rule.state()
    optimizer.step()
    now = zo.rule.state()
    if at_fold == "reset":
        assert now == {}
    else:
        for name in zo.subspace.coordinates:
            assert torch.equal(now[f"momentum/{name}"], last[f"momentum/{name}"])
    assert not any(name.startswith("right/") for name in now)
