"""The layout: data flows one way, so that a part can be read without those above it."""

from __future__ import annotations

import pytest

from tests import import_graph
from tests.import_graph import FLOOR_OF, FLOORS, PACKAGE


def test_every_part_has_a_floor() -> None:
    assert set(import_graph.by_part()) <= set(FLOOR_OF) and len(FLOORS) <= 12


def test_nothing_imports_from_above_itself() -> None:
    upward = {
        f"{part} imports {target}"
        for part, targets in import_graph.by_part().items()
        for target in targets
        if FLOOR_OF[target] < FLOOR_OF[part]
    }
    assert not upward


def test_imports_have_no_cycle() -> None:
    # Between modules, and between folders; a package's __init__ gathers what its files hold.
    graph = import_graph.imports()
    files = {module for module, path in import_graph.modules().items() if path.name != "__init__.py"}
    between_files = {module: targets & files for module, targets in graph.items() if module in files}
    assert not import_graph.cycles(between_files)
    assert not import_graph.cycles(import_graph.by_part())


def test_a_cycle_would_be_found() -> None:
    assert import_graph.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]


def test_the_root_stays_small() -> None:
    assert len(set(PACKAGE.glob("*.py")) - {PACKAGE / "__init__.py"}) <= 7


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_grows_past_a_sitting(path: object) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500  # type: ignore[attr-defined]
