"""Every relative link of the documentation leads to a page, and every fragment to a heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, anchors, generated, headings, links, name_of, slugs, sources

WRITTEN = {path: path.read_text(encoding="utf-8") for path in sources()}
MADE = {DOCS / path: text for path, text in generated().items()}
PAGES = {**MADE, **WRITTEN}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: name_of(path))
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(PAGES[path]):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, fragment = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        page = file.with_suffix(".md") if file.suffix == ".ipynb" else file
        assert page in PAGES or file.is_file(), f"{link} leads to no file"
        if DOCS in path.parents:
            assert DOCS in file.parents, f"{link} leads out of the site"
        if fragment:
            assert fragment in anchors(PAGES[page]), f"{link} leads to no heading"
            heading = next(h for h in headings(PAGES[page]) if fragment in slugs(h))
            assert slugs(heading) == {fragment}, (
                f"the site and the host of the code differ about #{fragment}: rename it"
            )


def test_the_source_names_pages_that_there_are() -> None:
    for path in [*(ROOT / "zo_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{name_of(path)} names {page}"


def test_pages_name_files_that_there_are() -> None:
    for path, text in WRITTEN.items():
        for file in re.findall(r"`((?:tests|recipes|docs)/[\w/.-]+)`", text):
            assert (ROOT / file).exists(), f"{name_of(path)} names {file}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"\b([\w/]+\.(?:md|ipynb))$", text, re.MULTILINE)
    there = [path.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)]
    assert sorted(listed) == sorted(there)
