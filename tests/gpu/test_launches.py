"""The launch budget: how many kernels a step and an evaluation launch at real widths, and how often the host waits.

The bounds are what is reached, see docs/results/launches.md. A change that needs more has to say why.
"""

from __future__ import annotations

import functools

import pytest

from tests.gpu.count import Case

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
    """Twelve beside six linear layers, and three beside each of two norms."""
    one = _counted(OPT, 1)
    _check(one, _counted(OPT, 2), first=161, layer=18)
    _, reads, uploads = one["step"]
    assert reads <= 2, "the losses, and the positions of labels"
    assert uploads == 0


@pytest.mark.slow
def test_counts_are_affine_in_the_number_of_layers() -> None:
    one, two, three = (_counted(OPT, layers) for layers in (1, 2, 3))
    for part in one:
        assert [c - 2 * b + a for a, b, c in zip(one[part], two[part], three[part], strict=True)] == [0, 0, 0], part


@pytest.mark.slow
def test_a_step_of_llama() -> None:
    """Fourteen beside seven linear layers; norms launch as many as without probes."""
    _check(_counted(LLAMA, 1), _counted(LLAMA, 2), first=181, layer=14)


@pytest.mark.slow
def test_a_direction_for_every_row_waits_no_more_often() -> None:
    _, reads, uploads = Case(OPT, {}, rows=True).counted(1)["step"]
    assert reads <= 2
    assert uploads == 0


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


@pytest.mark.slow
def test_a_fold_of_opt_with_kernels() -> None:
    """One launch a weight."""
    pytest.importorskip("triton")
    launches, reads, _ = Case(OPT, {}, folds=True, kernels=True).at_depth()["fold"]
    assert launches <= 284
    assert reads == 0
