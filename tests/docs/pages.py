"""The documentation as text: its pages, their blocks of code, links and headings."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_build"))  # what builds the site is no package

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)\s*$")
MARK = re.compile(r"^<!-- (?P<kind>not run|given): (?P<text>.+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        language: what stands behind the fence; "" where nothing does.
        text: its lines.
        line: of its fence, from 1.
        not_run: why it is not run; "" where it is.
        given: names that it uses and another has to define.
    """

    language: str
    text: str
    line: int
    not_run: str = ""
    given: tuple[str, ...] = ()


def sources() -> list[Path]:
    """Every page that a person has written: the README and docs/**/*.md."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(path: Path) -> str:
    """A page in the name of a test."""
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            number += 1
            continue
        start = number
        number += 1
        while not re.fullmatch(rf"{opening['fence']}`*\s*", lines[number]):
            number += 1
        mark = MARK.match(lines[start - 1]) if start else None
        not_run = mark["text"] if mark is not None and mark["kind"] == "not run" else ""
        given = tuple(mark["text"].split(", ")) if mark is not None and mark["kind"] == "given" else ()
        content = "\n".join(lines[start + 1 : number])
        found.append(Block(opening["language"], content, start + 1, not_run, given))
        number += 1
    return found


def prose(text: str) -> str:
    """A page without its blocks of code."""
    kept: list[str] = []
    fence = ""
    for line in text.split("\n"):
        match = re.match(r"^(`{3,})", line)
        if fence:
            fence = "" if match is not None and len(match[1]) >= len(fence) else fence
        elif match is not None:
            fence = match[1]
        else:
            kept.append(line)
    return "\n".join(kept)


def links(text: str) -> list[str]:
    """The targets of a page's links and figures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def anchors(text: str) -> set[str]:
    """The fragments that lead to a page's headings, here and where the code is hosted."""
    return {slug for heading in headings(text) for slug in slugs(heading)}


def headings(text: str) -> list[str]:
    """A page's headings."""
    return [match[1].strip() for match in re.finditer(r"^#{1,6} (.+)$", prose(text), re.MULTILINE)]


def slugs(heading: str) -> set[str]:
    """What the site makes of a heading, and what the host of the code does; one if they agree."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    ascii_ = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_).strip().lower())
    host = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
    return {site, host}


@cache
def generated() -> dict[str, str]:
    """The pages that the build makes, by their path below docs/."""
    import method_pages
    import notebooks

    pages = {page.path: page.markdown() for page in method_pages.method_pages()}
    for path in DOCS.rglob("*.ipynb"):
        text, figures = notebooks.as_markdown(json.loads(path.read_text(encoding="utf-8")), path.stem)
        page = path.relative_to(DOCS).with_suffix(".md")
        pages[page.as_posix()] = text
        pages |= {page.with_name(name).as_posix(): "" for name in figures}
    return pages
