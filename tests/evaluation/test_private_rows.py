"""The private numbers of a step: those of the rows, clipped, summed and hidden, wherever the rows are evaluated."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import assert_same_bits, seeded
from tests.methods.table import Tiny
from zo_hf import ZerothOrder
from zo_hf.evaluation.row_losses import RowLosses
from zo_hf.parallel.ranks import Grid, Ranks
from zo_hf.privacy import Secret

WIDE = {"dp_noise_multiplier": 0.0, "dp_max_c": 1e4}
TOKENS = torch.arange(36).view(12, 3) % 11
LABELS = torch.arange(12) % 3


def each(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(TOKENS[rows]), LABELS[rows], reduction="none")


def private(rows: int = 12, **options: Any) -> ZerothOrder:
    zo = ZerothOrder(seeded(Tiny), "low_rank", seed=3, rank=2, **{"eps": 1e-2} | options)
    if zo.private is not None:
        zo.private.secret, zo.private.expected_rows = Secret(bytes(32)), rows
    return zo


def numbers_of(zo: ZerothOrder, losses: Any) -> tuple[float, ...]:
    return zo.estimate(losses).projected_gradients


@pytest.mark.parametrize("estimator", ["two_point", "one_sided"])
@pytest.mark.parametrize("directions", [1, 3])
def test_without_noise_and_with_a_wide_bound_the_numbers_are_those_of_the_mean(
    estimator: str, directions: int
) -> None:
    options = {"estimator": estimator, "num_directions": directions}
    zo, plain = private(**WIDE, **options), private(**options)
    found = numbers_of(zo, lambda: RowLosses(each(zo.model)))
    assert found == pytest.approx(numbers_of(plain, lambda: each(plain.model).mean()), rel=1e-3, abs=1e-4)


def test_with_a_direction_for_every_row_each_number_is_the_sum_over_the_rows_that_drew_it() -> None:
    zo = private(**WIDE, rows_per_direction=3)
    assert zo.groups == 4
    found = numbers_of(zo, lambda: RowLosses(each(zo.model)))
    group_of = zo.private.secret.groups(0, 12, 4)
    other = private(num_directions=4)
    along: list[list[float]] = []
    for direction in range(4):
        probes = [zo.estimator.probes()[sign] for sign in (0, 1)]
        losses = []
        for probe in probes:
            point = type(probe)(direction, probe.scale)
            with torch.no_grad(), other.subspace.at((point,), other._stream, other.distribution):
                losses.append(each(other.model).double())
        along.append(((losses[0] - losses[1]) / (2 * zo.estimator.eps)).tolist())
    expected = [sum(c for row, c in enumerate(along[g]) if group_of[row] == g) / 12 for g in range(4)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(set(group_of)) > 1


@pytest.mark.parametrize("rows_per_direction", [0, 3])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_row_more_or_less_changes_the_numbers_by_at_most_the_bound(rows_per_direction: int, directions: int) -> None:
    """Of the last row, whose place no other row needs; a row that is as steep as can be."""
    bound = 0.05
    options = {"dp_noise_multiplier": 0.0, "dp_max_c": bound, "rows_per_direction": rows_per_direction}
    found = []
    for rows in (slice(None), slice(11)):
        zo = private(**options, num_directions=directions)
        steep = torch.ones(12)
        steep[-1] = 1e6
        found.append(numbers_of(zo, lambda z=zo, r=rows, s=steep: RowLosses(each(z.model, r) * s[r])))
    changed = math.dist(*found) * 12
    assert changed <= bound * (1 + 1e-9)
    assert changed == pytest.approx(bound, rel=1e-6)  # it is as steep as can be


def test_a_row_that_is_not_finite_counts_as_nothing_and_no_step_is_skipped() -> None:
    def with_nan(zo: ZerothOrder, fill: float) -> Any:
        def losses() -> RowLosses:
            found = each(zo.model)
            return RowLosses(torch.cat([found[:11], torch.full((1,), fill)]))

        return losses

    zo, flat = private(**WIDE), private(**WIDE)
    broken = zo.estimate(with_nan(zo, math.nan))
    assert broken.is_finite and broken.projected_gradients == numbers_of(flat, with_nan(flat, 1.0))


def test_the_noise_is_added_once_a_step_and_in_every_number() -> None:
    quiet, loud = (
        private(dp_noise_multiplier=sigma, dp_max_c=2.0, rows_per_direction=3, num_directions=2)
        for sigma in (0.0, 1.5)
    )
    for zo in (quiet, loud):
        for part in (slice(0, 4), slice(4, 12)):  # two micro-batches
            zo.probe(lambda z=zo, p=part: RowLosses(each(z.model, p)))
    without, found = (zo.finish_estimate().projected_gradients for zo in (quiet, loud))
    noise = Secret(bytes(32)).gaussian(0, 8)
    assert [b - a for a, b in zip(without, found, strict=True)] == pytest.approx([1.5 * 2.0 * n / 12 for n in noise])


def test_micro_batches_and_ranks_give_the_numbers_of_one_batch() -> None:
    """To the bit where rows have the same losses: their sum is exact, and one secret makes the noise."""
    options = {"dp_noise_multiplier": 1.0, "dp_max_c": 0.5, "rows_per_direction": 2, "direction": "rademacher"}

    def losses_of(zo: ZerothOrder, part: slice) -> Any:
        # Every row by itself, so that no kernel depends on how many there are.
        return lambda: RowLosses(each(zo.model, part))

    def by_ranks(parts: list[slice]) -> list[tuple[float, ...]]:
        found: list[Any] = [None] * len(parts)
        barrier, held = threading.Barrier(len(parts)), [None] * len(parts)

        class Threads(Ranks):
            def all_gather(self, tensor: Tensor) -> Tensor:
                barrier.wait()
                held[self.grid.rank] = tensor.clone()
                barrier.wait()
                return torch.stack(held)

            def broadcast(self, tensor: Tensor) -> None:
                tensor.copy_(self.all_gather(tensor)[0])

        starts = [part.start for part in parts]
        # Made here, because making a model seeds torch's generator, which all threads share.
        engines = [private(**options, ranks=Threads(Grid(data=len(parts), rank=rank))) for rank in range(len(parts))]

        def work(rank: int) -> None:
            zo = engines[rank]
            zo.private.part_of = lambda step, micro: (starts[rank], parts[rank].stop - parts[rank].start)
            found[rank] = numbers_of(zo, losses_of(zo, parts[rank]))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    whole = private(**options)
    expected = numbers_of(whole, losses_of(whole, slice(0, 12)))
    first, second = by_ranks([slice(0, 6), slice(6, 12)])
    assert first == second
    assert first == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_its_numbers_replay_and_a_probe_writes_nothing() -> None:
    options = {"dp_noise_multiplier": 1.0, "dp_max_c": 0.5, "rows_per_direction": 2, "noise_scale_steps": 2}
    zo, again = private(**options), private(**options)
    recorded: list[Any] = []
    zo.on_step = recorded.append
    optimizer = zo.prepare(torch.optim.SGD(zo.coordinates(), lr=0.1))
    for _ in range(4):
        before = {name: tensor.clone() for name, tensor in zo.model.state_dict().items()}
        zo.estimate(lambda: RowLosses(each(zo.model)))
        assert_same_bits(zo.model.state_dict(), before)
        optimizer.step()
    second = again.prepare(torch.optim.SGD(again.coordinates(), lr=0.1))
    for step in recorded:
        again.apply(step.projected_gradients, step.skipped)
        second.step()
    assert_same_bits(again.finish().state_dict(), zo.finish().state_dict())


class Mixing(nn.Module):
    """Rows that see each other's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.inner(tokens)
        return found + found.mean(0)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (
            lambda model: each(model).mean(),
            "needs a loss for every row, and this one is of all rows; use the model's own",
        ),
        (lambda model: RowLosses(each(model)), "because its rows depend on each other"),
    ],
)
def test_a_loss_that_does_not_come_apart_is_refused(losses: Any, message: str) -> None:
    model = seeded(Mixing)
    zo = ZerothOrder(model, "low_rank", rank=2, dp_noise_multiplier=1.0, dp_max_c=1.0)
    zo.private.expected_rows = 12
    with pytest.raises(ValueError, match=message):
        zo.estimate(lambda: losses(model))


def test_an_engine_that_does_not_know_the_size_of_a_step_says_so() -> None:
    zo = ZerothOrder(seeded(Tiny), "low_rank", rank=2, dp_noise_multiplier=1.0, dp_max_c=1.0)
    with pytest.raises(ValueError, match=r"set zo\.private\.expected_rows"):
        zo.estimate(lambda: RowLosses(each(zo.model)))


@pytest.mark.parametrize("common", [True, False])
def test_a_loss_that_draws_random_numbers_is_refused(common: bool) -> None:
    """With one row more, those behind it would get other numbers."""
    zo = private(dp_noise_multiplier=1.0, dp_max_c=1.0, common_random_numbers=common)
    with pytest.raises(ValueError, match="because it draws random numbers, and one row more"):
        zo.estimate(lambda: RowLosses(F.dropout(each(zo.model), 0.5)))


class Routed(nn.Module):
    """A part of it is for some rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.expert = Tiny(), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.inner(tokens)
        rare = (tokens[:, 0] == 10).unsqueeze(1)
        return torch.where(rare, self.expert(found), found) if bool(rare.any()) else found


def test_a_parameter_that_the_first_step_does_not_read_is_refused() -> None:
    """The step in which it begins to move would be in the log, and tell of a row."""
    zo = ZerothOrder(seeded(Routed), "full", dp_noise_multiplier=1.0, dp_max_c=1.0)
    assert zo.private is not None
    zo.private.expected_rows = 3
    with pytest.raises(ValueError, match=r"the first step did not read expert\.bias, .* zo_exclude_modules"):
        zo.estimate(lambda: RowLosses(each(zo.model, slice(0, 3))))
