"""No operation of a step, a fold or a copy of the weights mixes devices, whatever the method: a new one joins by its name.

Two entries are left out: scales, because the libraries of quantized layers make no fake tensors, and sparse directions,
which depend on the values of weights.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.fake_cuda import CUDA, fake_cuda
from tests.methods import table
from tests.methods.table import Combination, subject
from zo_hf.rng import philox_wide

LEFT_OUT = {("subspace", "scales"), ("direction", "sparse")}


def _one_for_every_entry() -> list[Combination]:
    """Few combinations that contain every other entry once."""
    every = [c for c in table.combinations() if not c.entries & LEFT_OUT]
    chosen: list[Combination] = []
    rest = {entry for c in every for entry in c.entries}
    while rest:
        chosen.append(max(every, key=lambda c: len(c.entries & rest)))
        rest -= chosen[-1].entries
    return chosen


class _Tiny(table.Tiny):
    def __init__(self) -> None:
        with torch.device(CUDA):
            super().__init__()


@pytest.fixture(autouse=True)
def _tiny_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "Tiny", _Tiny)
    monkeypatch.setattr(philox_wide, "ROUNDS", 1)  # the others do the same


def _check(combination: Combination, batched: bool, kernels: bool = False) -> None:
    with fake_cuda(kernels):
        made = subject(combination, batched=batched, device=CUDA)
        for _ in range(3):  # with a fold after the second
            made.step()
        made.model(made.loss.tokens)
        assert all(tensor.device == CUDA for tensor in made.model.state_dict().values())
        made.zo.finish()


def _draws_much(combination: Combination) -> bool:
    return combination.subspace == "full" or combination.direction == "orthogonal"


@pytest.mark.parametrize(
    "combination",
    [pytest.param(c, marks=pytest.mark.slow if _draws_much(c) else (), id=str(c)) for c in _one_for_every_entry()],
)
def test_every_entry_of_the_registries(combination: Combination) -> None:
    _check(combination, batched=False)


@pytest.mark.parametrize(
    "subspace", ["low_rank", *(pytest.param(name, marks=pytest.mark.slow) for name in ("core", "norms", "full"))]
)
def test_probes_in_one_batch(subspace: str) -> None:
    _check(Combination("two_point", "none", "gaussian", subspace), batched=True)


@pytest.mark.parametrize("subspace", ["low_rank", "full"])
@pytest.mark.parametrize("direction", ["gaussian", "rademacher"])
def test_with_kernels(subspace: str, direction: str) -> None:
    pytest.importorskip("triton")
    _check(Combination("two_point", "none", direction, subspace), batched=True, kernels=True)
