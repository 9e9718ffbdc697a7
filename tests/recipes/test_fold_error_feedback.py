"""Error feedback keeps the codes near what has been learned, however many folds there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import seeded, tiny_llama
from tests.quantized_models import quantize
from tests.recipes.recipe_module import recipe_module
from zo_hf.subspaces import LowRank


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
    return recipe_module("fold_error_feedback")


@pytest.mark.parametrize("keep", [False, True])
def test_codes_stay_within_a_code_of_what_has_been_learned_if_errors_are_kept(recipe: Any, keep: bool) -> None:
    model = quantize(seeded(tiny_llama), "nf4", only=["q_proj"])
    subspace = LowRank(model, rank=2, fold_steps=1, target_modules=".*q_proj.*")
    errors = recipe.FoldErrors(keep)
    errors.follow(subspace)
    learned = errors.decoded()
    for step in range(1, 65):
        with torch.no_grad():
            for name, coordinate in subspace.coordinates.items():
                coordinate.fill_(0.003 * (-1) ** step)
                learned[name] = learned[name] + subspace._rows(subspace.factored[name], 0, coordinate.shape[0])
        subspace.coordinates_changed()
        subspace.fold(step, {})
    assert errors.relative(errors.learned, learned) < 1e-6
    codes, layers = errors.decoded(), {site.name: site.layer for site in subspace.sites}
    largest = 0.0  # error over the largest magnitude of its block
    for name, layer in layers.items():
        blocks = (codes[name] - errors.learned[name]).abs().view(-1, 64).amax(1)
        largest = max(largest, float((blocks / layer.storage()["weight.absmax"]).max()))
    assert (largest < 0.31) is keep  # the widest gap between two levels of nf4 is 0.304
