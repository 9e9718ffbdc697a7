"""Values of options: what is taken becomes Python's own, and the rest is refused in one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_hf import ZOConfig
from zo_hf.method_info import Choice, Flag, Pattern, Real, Texts, Values, Whole, checked, shown
from zo_hf.settings import Settings
from zo_hf.trainer.argument_values import ARGUMENT_VALUES

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.lists(st.integers())
    | st.dictionaries(st.text(), st.integers())
    | st.sampled_from([np.float32(0.5), np.int16(3), np.bool_(True), np.float64("nan"), object, 10**5000])
)
KINDS: list[Values] = [
    *(part.metadata["values"] for part in fields(Settings)),
    *(values for values, _ in ARGUMENT_VALUES.values()),
]


@given(st.sampled_from(KINDS), ANYTHING)
def test_a_value_is_plain_or_refused_in_one_sentence(values: Values, value: Any) -> None:
    try:
        kept = checked("zo_option", value, values, "use another")
    except ValueError as error:
        message = str(error)
        assert message.startswith("zo_option=") and message.endswith("; use another.") and "\n" not in message
        assert len(message) < 400
    else:
        json.dumps(kept, allow_nan=False)
        assert checked("zo_option", kept, values, "use another") == kept


@given(st.integers(-5, 5), st.integers(-5, 5), st.booleans(), st.booleans(), st.floats(-7, 7) | st.integers(-7, 7))
def test_the_ends_of_a_range(low: int, high: int, above: bool, below: bool, value: float) -> None:
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    try:
        checked("x", value, Real(low, high, above, below), "use another")
    except ValueError:
        assert not inside
    else:
        assert inside


@pytest.mark.parametrize(
    ("values", "value", "kept"),
    [
        (Whole(1), np.int64(3), 3),
        (Real(0), np.float32(0.5), 0.5),
        (Real(0), 2, 2.0),
        (Flag(), np.bool_(False), False),
        (Pattern(), ("a", "b"), ["a", "b"]),
        (Texts(), ("a",), ["a"]),
        (Choice(("a",), also=(True,)), True, True),
    ],
)
def test_numbers_of_numpy_become_pythons_own(values: Values, value: Any, kept: Any) -> None:
    found = checked("x", value, values, "use another")
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize("value", [True, 1.0, "1", math.nan, 2**63, None, [1]], ids=str)
def test_what_only_looks_like_a_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 0"):
        checked("x", value, Whole(0), "use another")


def test_a_long_value_is_shown_in_short() -> None:
    assert len(shown(list(range(10**5)))) < 100 and "\n" not in shown(np.zeros((50, 50)))


def test_every_option_of_the_config_is_checked() -> None:
    declared = {f"zo_{part.name}" for part in fields(Settings)} | set(ARGUMENT_VALUES)
    assert {part.name for part in fields(ZOConfig) if part.name.startswith("zo_")} <= declared
