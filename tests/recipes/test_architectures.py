"""The table of architectures, for three of them; the recipe makes it for all."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize("model", ["MambaForCausalLM", "ViTForImageClassification", "Qwen3MoeForCausalLM"])
def test_c_is_the_slope_along_the_step_taken(recipe: ModuleType, model: str) -> None:
    architecture = next(a for a in recipe.ARCHITECTURES if a.model == model)
    for way in recipe.WAYS:
        comparison = recipe.compare(architecture, way, seeds=1)
        assert comparison.error < 1e-6
        assert comparison.moved == 1.0 and comparison.unmoved == ()


def test_the_table_has_a_line_for_each_and_names_what_does_not_move(recipe: ModuleType) -> None:
    chosen = [a for a in recipe.ARCHITECTURES if a.model == "Dinov2ForImageClassification"]
    lines = recipe.table(chosen).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| vision | `Dinov2ForImageClassification` |")
    assert "`dinov2.embeddings.mask_token`" in lines[2]


def test_there_are_many_of_every_kind(recipe: ModuleType) -> None:
    architectures = recipe.ARCHITECTURES
    kinds = {a.kind for a in architectures}
    assert len({a.model for a in architectures}) == len(architectures) >= 40
    assert {"state space", "hybrid", "mixture of experts", "encoder", "encoder-decoder"} <= kinds
    assert {"vision", "vision-language", "speech"} <= kinds
