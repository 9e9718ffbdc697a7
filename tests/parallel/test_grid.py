"""Who evaluates what, and how the parts come together; without any process but this one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_hf.estimators import TwoPoint
from zo_hf.parallel.checksum import tensor_checksum
from zo_hf.parallel.ranks import Grid, Ranks, ReplicasDiffer, _signed, make_grid


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_every_probe_is_evaluated_once_for_every_batch(data: int, directions: int, each: int) -> None:
    probes = TwoPoint(1e-3, directions * each).probes()
    grids = [Grid(data, directions, rank) for rank in range(data * directions)]
    readers = [(grid.data_index, position) for grid in grids for position in grid.own(probes)]
    assert sorted(readers) == [(batch, position) for batch in range(data) for position in range(len(probes))]
    assert len({len(grid.own(probes)) for grid in grids}) == 1


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_losses_come_back_in_the_order_of_the_probes(data: int, directions: int, each: int, seed: int) -> None:
    probes = TwoPoint(1e-3, directions * each).probes()
    table = torch.rand(data, len(probes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grids = [Grid(data, directions, rank) for rank in range(data * directions)]
    gathered = torch.stack([table[grid.data_index, grid.own(probes)] for grid in grids])
    losses = [grid.mean_losses(gathered, probes) for grid in grids]
    assert all(torch.equal(other, losses[0]) for other in losses)
    torch.testing.assert_close(losses[0], table.mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("parallel", "world_size", "num_directions", "shape"),
    [
        ("data", 4, 1, (4, 1)),
        ("data", 3, 6, (3, 1)),
        ("directions", 4, 8, (1, 4)),
        ("both", 4, 2, (2, 2)),
        ("both", 8, 4, (2, 4)),
        ("both", 6, 4, (3, 2)),
        ("both", 3, 2, (3, 1)),
        ("directions", 1, 1, (1, 1)),
    ],
)
def test_the_shape_of_the_grid(parallel: str, world_size: int, num_directions: int, shape: tuple[int, int]) -> None:
    for rank in range(world_size):
        grid = make_grid(parallel, world_size, rank, num_directions)
        assert (grid.data, grid.directions) == shape and grid.rank == rank and grid.world_size == world_size


def test_directions_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zo_num_directions=3.*zo_parallel='both'") as refusal:
        make_grid("directions", 2, 0, 3)
    assert str(refusal.value).count(". ") == 0


class Table(Ranks):
    """Ranks whose other members hold what a table says, one entry for each collective."""

    def __init__(self, grid: Grid, *others: object) -> None:
        super().__init__(grid)
        self.others = list(others)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        other = self.others.pop(0)
        return torch.stack([tensor, *[tensor if part is None else part for part in other]])


def test_the_message_names_the_step_the_rank_and_the_first_tensor() -> None:
    coordinates = {"a": torch.zeros(3), "b": torch.ones(2)}
    weights = {"w0": torch.ones(4), "w1": torch.ones(4)}
    sums = torch.tensor([_signed(tensor_checksum(t)) for t in (coordinates["a"], coordinates["b"] * 2, weights["w0"])])
    ranks = Table(Grid(data=3), [torch.tensor(1), None], [sums, None])
    with pytest.raises(ReplicasDiffer, match=r"step 70 rank 1 of 3 .* first in the coordinates of b;"):
        ranks.check_replicas(coordinates, weights, turn=0, step=70)


@pytest.mark.parametrize("turn", range(3))
def test_every_check_reads_every_coordinate(turn: int) -> None:
    """Coordinates go by the names of the weights that they move."""

    class Other(Ranks):
        sent: list[torch.Tensor]

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            self.sent.append(tensor)
            return torch.stack([tensor, tensor])

    read = []
    for value in (0.0, 1.0):
        ranks = Other(Grid(data=2))
        ranks.sent = []
        named = {f"w{i}": torch.zeros(2) for i in range(3)}
        ranks.check_replicas(named | {f"w{turn}": torch.full((2,), value)}, named, turn, step=0)
        read.append(ranks.sent[0])
    assert read[0] != read[1]


def test_without_a_turn_every_weight_is_read() -> None:
    weights = {f"w{i}": torch.full((2,), float(i)) for i in range(20)}
    sums = torch.tensor([_signed(tensor_checksum(t)) for t in weights.values()])
    sums[17] += 1
    ranks = Table(Grid(data=2), [torch.tensor(1)], [sums])
    with pytest.raises(ReplicasDiffer, match=r"step 4 rank 1 of 2 .* first in w17;"):
        ranks.check_replicas({}, weights, turn=None, step=4)


def test_one_process_alone_sends_nothing() -> None:
    ranks = Ranks()
    assert torch.equal(ranks.all_gather(torch.ones(2)), torch.ones(1, 2))
    ranks.broadcast(torch.ones(2))
    ranks.check_replicas({"a": torch.ones(1)}, {}, 0, 0)
    ranks.check_shared_batch({"x": torch.ones(1)}, torch.device("cpu"))
    ranks.barrier()
    assert ranks.bytes_sent == 0
