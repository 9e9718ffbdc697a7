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


def _few() -> list[Combination]:
    return [c for c in table.one_for_every_entry() if c.subspace != "scales" and c.direction != "sparse"]


def _more() -> list[Combination]:
    few = _few()
    every = [c for c in table.combinations() if c.subspace != "scales" and c.direction != "sparse"]
    return [c for c in every if c not in few]


class _Tiny(table.Tiny):
    def __init__(self) -> None:
        with torch.device(CUDA):
            super().__init__()


@pytest.fixture(autouse=True)
def _tiny_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "Tiny", _Tiny)
    monkeypatch.setattr(philox_wide, "ROUNDS", 1)  # the others do the same


def _check(combination: Combination, batched: bool) -> None:
    with fake_cuda():
        made = subject(combination, batched=batched, device=CUDA)
        for _ in range(3):  # with a fold after the second
            made.step()
        made.model(made.loss.tokens)
        assert all(tensor.device == CUDA for tensor in made.model.state_dict().values())
        made.zo.finish()


@pytest.mark.parametrize("combination", _few(), ids=str)
def test_every_entry_of_the_registries(combination: Combination) -> None:
    _check(combination, batched=False)


@pytest.mark.parametrize("combination", _more(), ids=str)
@pytest.mark.slow
def test_every_pair_of_entries(combination: Combination) -> None:
    _check(combination, batched=False)


@pytest.mark.parametrize(
    "subspace", ["low_rank", *(pytest.param(name, marks=pytest.mark.slow) for name in ("core", "norms", "full"))]
)
def test_probes_in_one_batch(subspace: str) -> None:
    _check(Combination("two_point", "none", "gaussian", subspace), batched=True)
