"""`zo-hf methods` lists what the registries hold, and every entry of them says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from zo_hf.cli import main as cli
from zo_hf.cli.method_tables import Kind, kinds
from zo_hf.cli.methods import WIDTH, as_json, as_markdown, as_text
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.evaluation.by_rows import BY_ROWS
from zo_hf.method_info import Method
from zo_hf.rules import RULES
from zo_hf.subspaces import SUBSPACES

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"
REGISTRIES: dict[str, dict[str, Any]] = {
    "estimators": ESTIMATORS,
    "directions": DISTRIBUTIONS,
    "rules": RULES,
    "subspaces": SUBSPACES,
}
ENTRIES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]
LONG = {
    "short": Method("One (2000.00001)"),
    "a_name_that_is_long": Method("word " * 30, "2q + 1", "number " * 20, "something " * 20),
}


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    cli.main(["methods", *options])
    return capsys.readouterr().out


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_says_what_it_is(kind: str, name: str) -> None:
    entry = REGISTRIES[kind][name]
    about = entry.about
    assert entry.name == name
    assert isinstance(about, Method)
    if isinstance(entry, type):
        assert "about" in vars(entry), "it says what the class it is derived from is"
    assert about.paper.strip() and about.memory.strip()
    if kind == "estimators":
        assert re.search(r"\d|q", about.forwards), "what does a step cost?"
    for text in (about.paper, about.forwards, about.memory, about.needs):
        assert text == " ".join(text.split()) and "|" not in text and not text.endswith(".")


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_every_entry_is_printed(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "--format", form)
    for kind, name in ENTRIES:
        assert re.search(rf"(^|\W){name}(\W|$)", shown)
        paper = re.findall(r"\d{4}\.\d{5}", REGISTRIES[kind][name].about.paper)
        assert all(number in shown for number in paper)


def test_lines_are_no_longer_than_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (printed(capsys), as_text({"long": Kind("zo_long", "shows much", LONG)})):
        assert max(map(len, text.splitlines())) <= WIDTH


def test_what_is_wrapped_is_all_there() -> None:
    lines = as_text({"long": Kind("zo_long", "shows much", LONG)}).splitlines()
    assert "\n".join(lines).count("something") == 20 and "\n".join(lines).count("number") == 20
    assert len(lines) > 6 and "zo_long" in lines[0]
    shown = as_text(kinds()).split()
    for kind, name in ENTRIES:
        about = REGISTRIES[kind][name].about
        assert {*about.paper.split(), *about.memory.split(), *about.needs.split()} <= set(shown), "words stay whole"
    assert [line.split()[0] for line in lines if re.match(r"  \w", line)] == ["name", *LONG]


def test_columns_that_hold_nothing_are_left_out() -> None:
    text = as_text({"one": Kind("zo_one", "does one", {"it": Method("Paper")})})
    assert text.splitlines()[2].split() == ["name", "paper", "memory"]


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(printed(capsys, "--format", "json"))
    assert content == json.loads(as_json(kinds()))
    for kind, registry in REGISTRIES.items():
        rows = {row.pop("name"): row for row in content[kind]["methods"]}
        assert {name: Method(**row) for name, row in rows.items()} == {n: e.about for n, e in registry.items()}


def test_what_combines_with_directions_for_rows_is_listed() -> None:
    """And nothing else of the same registries is."""
    needs = kinds()["rows"].methods["k"].needs
    for option, names in BY_ROWS.items():
        named = re.search(rf"zo_{option}=(.*?)(, zo_|$)", needs)
        assert named is not None and re.findall(r"'(\w+)'", named[1]) == list(names)


def test_markdown_links_papers() -> None:
    table = as_markdown({"one": Kind("zo_one", "does one", {"it": Method("Paper (2000.12345)")})})
    assert "| `it` | Paper ([2000.12345](https://arxiv.org/abs/2000.12345)) | 0 |" in table


def test_the_document_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = re.search(r"<!-- begin: zo-hf (.*?) -->\n(.*)<!-- end -->", text, re.DOTALL)
    assert shown is not None
    cli.main(shown[1].split())
    assert shown[2] == capsys.readouterr().out, f"put what `zo-hf {shown[1]}` prints into {DOCUMENT.name}"
