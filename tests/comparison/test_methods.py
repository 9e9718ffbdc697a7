"""The methods that can be compared."""

from __future__ import annotations

import pytest

from zo_hf.comparison.methods import METHODS, Method, added_method, choose, follows_slopes


def test_methods_that_do_not_exist_here_are_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    methods = {
        "new": Method("a", 1.0, {"zo_estimator": "not yet", "zo_new_option": 3}),
        "old": Method("a", 1.0, {"zo_estimator": "two_point"}),
    }
    assert list(choose(None, methods)) == ["old"]
    shown = capsys.readouterr().out
    assert shown == "skipped new: this version of zo_hf has no zo_estimator=not yet, zo_new_option=3\n"
    with pytest.raises(ValueError, match="--methods ol matches none of new, old"):
        choose(["ol"], methods)


def test_a_method_can_be_added_by_its_options() -> None:
    words = ["mine", "3e-4", "zo_rank=8", "zo_normalize=true", "zo_eps=1e-4"]
    expected = Method("added", 3e-4, {"zo_rank": 8, "zo_normalize": True, "zo_eps": 1e-4})
    assert added_method(words) == ("mine", expected)
    with pytest.raises(ValueError, match="--add mine must be a name, a learning rate, and OPTION=VALUE words"):
        added_method(["mine"])


def test_methods_that_divide_by_slopes_have_the_same_rates_for_every_loss() -> None:
    divide = {name for name, method in METHODS.items() if not follows_slopes(method.options)}
    assert divide == {
        *("fzoo q8", "evolution q4", "rows adamw", "low_rank normalized", "low_rank adamw", "sign"),
        *("zo-muon", "power_iteration", "adamw with backward"),
    }
