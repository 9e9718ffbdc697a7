"""What the site makes of the code: a page for every method, the keys of the log, the notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, ROOT
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.rules import RULES
from zo_hf.subspaces import SUBSPACES

import method_pages  # isort: skip  # found by tests.docs.pages
import notebooks  # isort: skip

REGISTRIES: dict[str, dict[str, Any]] = {
    "estimators": ESTIMATORS,
    "directions": DISTRIBUTIONS,
    "rules": RULES,
    "subspaces": SUBSPACES,
}
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_method_has_a_page_with_its_paper_and_formula(kind: str) -> None:
    for name, method in REGISTRIES[kind].items():
        page = method_pages.page_of(method.__module__)
        assert page is not None and method in page.classes
        text = page.markdown()
        assert f"`{method_pages.OPTIONS[kind]}={name!r}`" in text
        assert all(f"(https://arxiv.org/abs/{number})" in text for number in re.findall(r"\d{4}\.\d{5}", text))
        assert f"::: {method.__module__}.{method.__qualname__}" in text


def test_the_table_links_every_name() -> None:
    text = method_pages.linked_table((DOCS / "methods.md").read_text(encoding="utf-8"))
    for registry in REGISTRIES.values():
        for name, method in registry.items():
            page = method_pages.page_of(method.__module__)
            assert f"| [`{name}`]({page.path}) |" in text


def test_the_page_about_the_source_has_every_folder_and_file_of_the_package() -> None:
    text = (DOCS / "extend" / "source.md").read_text(encoding="utf-8")
    parts = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "zo_hf").iterdir()}
    assert set(re.findall(r"^[├└]── (\S+)", text, re.MULTILINE)) == parts - {"__pycache__/", "py.typed"}


def test_formulas_become_code_and_prose_stays_prose() -> None:
    docstring = "See [it] (arXiv 2305.17333).\n\n    a = b * c        d\n\n    e\n\nx = y        z\n\nNow x_1 < `x_2`; docs/cocd.md."
    assert method_pages.prose(docstring) == (
        "See \\[it\\] (arXiv [2305.17333](https://arxiv.org/abs/2305.17333)).\n\n"
        "```text\na = b * c        d\n\ne\n\nx = y        z\n```\n\n"
        "Now x\\_1 &lt; `x_2`; [cocd](../../cocd.md)."
    )


def test_the_page_of_log_keys_has_all_of_them() -> None:
    page = (DOCS / "guides" / "log_keys.md").read_text(encoding="utf-8")
    logged = {
        key for path in (ROOT / "zo_hf").rglob("*.py") for key in re.findall(r'"(zo/\w+)"', path.read_text("utf-8"))
    }
    assert len(logged) >= 12
    assert all(f"`{key}`" in page for key in logged), logged


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And show what they did when they were last run, in kind."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    again = notebooks.run(notebook)

    def kinds(content: dict[str, Any]) -> list[list[str]]:
        return [[output["output_type"] for output in cell.get("outputs", [])] for cell in content["cells"]]

    assert kinds(again) == kinds(notebook), f"run python docs/_build/notebooks.py {path.relative_to(ROOT)}"
    if path.stem == "first_steps":
        printed, stored = (
            "".join("".join(o.get("text", "")) for cell in content["cells"] for o in cell.get("outputs", []))
            for content in (again, notebook)
        )
        passes = [re.findall(r"'zo/forward_passes': (\d+)", text) for text in (printed, stored)]
        assert passes[0] == passes[1], f"run python docs/_build/notebooks.py {path.relative_to(ROOT)}"
        before, after = map(float, re.findall(r"held-out loss ([\d.]+) -> ([\d.]+)", printed)[0])
        assert after < before / 3 and "the same bits: True" in printed


def test_notebooks_become_pages() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# A"]},
        {
            "cell_type": "code",
            "source": ["1 + 1"],
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": ["said\n"]},
                {"output_type": "display_data", "data": {"image/png": "aGk="}, "metadata": {}},
                {"output_type": "execute_result", "data": {"text/plain": ["2"]}, "metadata": {}},
            ],
        },
    ]
    text, figures = notebooks.as_markdown({"cells": cells}, "a_b")
    expected = "# A\n\n```python\n1 + 1\n```\n\n```text\nsaid\n```\n\n![a b, figure 1](a_b-1.png)\n\n```text\n2\n```\n"
    assert (text, figures) == (expected, {"a_b-1.png": b"hi"})


def test_a_run_has_what_cells_print_and_their_last_value() -> None:
    cells = [{"cell_type": "code", "source": ["x = 1\n", "print(x)\n", "x + 1"], "outputs": []}]
    (cell,) = notebooks.run({"cells": cells})["cells"]
    assert [output.get("text") or output["data"]["text/plain"] for output in cell["outputs"]] == [["1\n"], ["2"]]
