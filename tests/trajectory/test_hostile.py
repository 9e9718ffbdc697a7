"""Logs with valid checksums and any content: refused with the model untouched, or replayed to the same bits twice.

`python -m tests.attacks logs` tries a fixed table of them; here hypothesis looks for others.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attacks.logs import answer, recorded
from tests.trajectory.hostile import Body, places, with_text
from tests.untrusted.test_untrusted import PLAIN

RUNS = st.sampled_from(("low_rank", "adamw", "full", "lora", "svrg", "cocd", "conservative", "rows"))
NUMBERS = st.floats() | st.sampled_from((1e20, -1e20, 3.4028235677973364e38, 3.4028235677973366e38))


def right(run: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert answer(run, Path(folder), content) is None


@settings(max_examples=60, deadline=None)
@given(run=RUNS, data=st.data())
def test_any_numbers_in_the_records(run: str, data: st.DataObject) -> None:
    parts = recorded(run).parts
    bodies = list(parts.bodies)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(bodies) - 1))
        size = len(bodies[at].numbers)
        numbers = data.draw(st.lists(NUMBERS, min_size=size, max_size=size))
        step = bodies[at].step + data.draw(st.sampled_from((0, 0, 0, 1, -1)))
        bodies[at] = Body(step, data.draw(st.sampled_from((0, 0, 1, 2, 4, 255))), tuple(numbers))
    right(run, replace(parts, bodies=tuple(bodies)).signed())


@settings(max_examples=120, deadline=None)
@given(run=RUNS, data=st.data())
def test_any_json_in_any_place_of_the_header(run: str, data: st.DataObject) -> None:
    parts = recorded(run).parts
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(places(json.loads(parts.header)), key=str)))
        parts = with_text(parts, path, json.dumps(data.draw(PLAIN)))
    right(run, parts.signed())
