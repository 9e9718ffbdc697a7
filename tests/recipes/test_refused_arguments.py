"""Arguments of recipes that cannot work end them with one sentence, before anything is loaded."""

from __future__ import annotations

import pytest

from tests.recipes.recipe_module import recipe_module

REFUSED = {
    "cocd_digits": {
        "--methods sgd": "--methods 'sgd' is unknown; choose among 'two-point', 'BCCD (γ = 0)'",
        "--network resnet20 --forwards -5": "--forwards -5 must be at least 1.",
        "--processes 0": "--processes 0 must be at least 1.",
        "--seeds 1 2 1": "--seeds 1 2 1 must differ",
    },
    "trace_and_generalization": {
        "--margins 4 0": "--margins must be above 0.",
        "--levels 0": "--levels must be above 0.",
        "--eps 0": "--eps must be above 0.",
        "--steps 19": "--steps 19 must be at least 20",
        "--examples 1": "--examples 1 must be 2 to 1796;",
        "--examples 1797": "--examples 1797 must be 2 to 1796;",
        "--seeds 1 1": "--seeds 1 1 must differ",
        "--plot-only --output nowhere": "--plot-only needs nowhere/runs.jsonl;",
    },
    "edge_of_stability_language_model": {
        "--model any --steps 0": "--steps 0 must be at least 1.",
        "--model any --margins 0": "--margins 0",
    },
    "noise_scale_beside_autograd": {
        "--model any --points 1": "--points 1 must be at least",
        "--model any --sentences 2": "--sentences 2 must be at least",
        "--model any --batch-size 1": "--batch-size 1 must be at least",
    },
    "variance_of_estimates": {"--model any --batch-size 5": "--batch-size 5 must be an even number from 4 on"},
}


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [(name, words, sentence) for name, cases in REFUSED.items() for words, sentence in cases.items()],
)
def test_arguments_that_cannot_work_are_refused_in_one_sentence(
    name: str, words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe_module(name).arguments(words.split())
    assert f"error: {sentence}" in capsys.readouterr().err
