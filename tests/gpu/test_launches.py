"""The launch budget: how many kernels a step and an evaluation launch at real widths, and how often the host waits.

The bounds are what is reached, see docs/results/launches.md. A change that needs more has to say why.
"""

from __future__ import annotations

import functools

import pytest

from tests.gpu.count import Case, matrices

OPT, LLAMA = "OPT-125M", "Llama-8B"
Counted = dict[str, tuple[int, int, int]]


@functools.cache
def _counted(model: str, layers: int) -> Counted:
    return Case(model, {}).counted(layers)


def _check(one: Counted, two: Counted, first: int, layer: int) -> None:
    """Launches of a step: at most `first` with one layer, and `layer` for every other one beyond a bare forward's."""
    assert one["step"][0] <= first
    more = {part: two[part][0] - one[part][0] for part in one}
    assert more["step"] - more["forward"] <= layer
    assert two["step"][1:] == one["step"][1:]


def test_a_step_of_opt() -> None:
    """Twelve beside six linear layers, and two beside each of two norms."""
    one = _counted(OPT, 1)
    _check(one, _counted(OPT, 2), first=143, layer=16)
    _, reads, uploads = one["step"]
    assert reads <= 1, "the losses"
    assert uploads == 0


@pytest.mark.parametrize("model", [OPT, *(pytest.param(name, marks=pytest.mark.slow) for name in ("OPT-1.3B", LLAMA))])
def test_the_budget_with_kernels(model: str) -> None:
    """A step launches at most 1.5 times as often as a bare forward, and 50 times; a fold 4 times a matrix, and 100 times."""
    pytest.importorskip("triton")
    found = Case(model, {}, folds=True, kernels=True).at_depth()
    (forward, *_), (step, reads, uploads) = found["forward"], found["step"]
    assert step <= 1.5 * forward + 50
    assert (reads, uploads) == (1, 0)
    assert found["fold"][0] <= 4 * matrices(model) + 100
    assert found["fold"][1] == found["evaluation"][1] == found["state dict"][1] == 0
    assert found["evaluation"][0] <= 2 * forward
    assert found["state dict"][0] <= 7 * matrices(model)


@pytest.mark.slow
def test_counts_are_affine_in_the_number_of_layers() -> None:
    one, two, three = (_counted(OPT, layers) for layers in (1, 2, 3))
    for part in one:
        assert [c - 2 * b + a for a, b, c in zip(one[part], two[part], three[part], strict=True)] == [0, 0, 0], part


@pytest.mark.slow
def test_a_step_of_llama() -> None:
    """Fourteen beside seven linear layers; norms launch as many as without probes."""
    _check(_counted(LLAMA, 1), _counted(LLAMA, 2), first=170, layer=14)


@pytest.mark.slow
def test_a_direction_for_every_row_waits_no_more_often() -> None:
    _, reads, uploads = Case(OPT, {}, rows=True).counted(1)["step"]
    assert reads <= 1
    assert uploads == 0


def test_a_step_with_a_graph_launches_as_many_kernels_at_any_depth() -> None:
    """The noise, the points of all layers, the graph and the update."""
    one, two = (Case(OPT, {}, graph=True).detailed(layers) for layers in (1, 2))
    assert one["step"].launches["graph"] == two["step"].launches["graph"] == 1
    assert two["step"].launches == one["step"].launches
    assert two["step"].total[1:] == (1, 0)


@pytest.mark.slow
def test_a_step_of_lora() -> None:
    counts = Case(OPT, {"subspace": "adapter"}, lora=8).counted(1)
    assert counts["step"][0] - counts["forward"][0] <= 80
    assert counts["step"][2] == 0


@pytest.mark.slow
def test_a_fold_of_opt() -> None:
    """Weights share their kernels: 125 million of them in tiles of 8 million."""
    launches, reads, _ = Case(OPT, {}, folds=True).at_depth()["fold"]
    assert launches <= 1381
    assert reads == 0


@pytest.mark.slow
def test_a_step_of_full_with_kernels() -> None:
    """Two for a matrix: one for all probes and one for the update. The rest beyond a bare forward's belongs to vectors."""
    pytest.importorskip("triton")
    case = Case(OPT, {"subspace": "full", "direction": "rademacher"}, kernels=True)
    one, two = (case.detailed(layers) for layers in (1, 2))
    more = two["step"].launches - one["step"].launches
    matrices, vectors = 6, 10
    assert more["perturbed_linear"] == matrices
    assert more["seeded_update"] == matrices + vectors
    assert more.total() - (two["forward"].launches - one["forward"].launches).total() <= 68
    assert two["step"].total[1:] == one["step"].total[1:]
