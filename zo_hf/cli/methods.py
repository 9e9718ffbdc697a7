"""List all methods, with their papers, costs and requirements.

    zo-hf methods                        a table for every option that selects a method
    zo-hf methods --format markdown      the same tables in Markdown
    zo-hf methods --format json          the same data in JSON

A run combines one entry of each table:

    trainer = ZOTrainer(model, ZOConfig("out", zo_estimator=..., zo_direction=..., zo_rule=..., zo_subspace=...))

forwards   forward passes of a step, with q = zo_num_directions
memory     numbers stored in addition to the model's weights, with d coordinates, matrices of m x n, rank r, and a batch of
           G groups of rows
needs      options or libraries that the method requires
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from zo_hf.method_info import Method

if TYPE_CHECKING:
    from zo_hf.cli.method_tables import Kind

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf methods`."""
    parser.add_argument("--format", choices=FORMATS, default="text", help="output format (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    from zo_hf.cli.method_tables import kinds

    print(FORMATS[args.format](kinds()))


def as_text(tables: Mapping[str, Kind]) -> str:
    """Return the tables as text of at most `WIDTH` characters a line; longer cells are wrapped."""
    return "\n\n".join(
        "\n".join((f"{name} ({kind.option}): {kind.does}", "", *_text_rows(_table(kind))))
        for name, kind in tables.items()
    )


def as_markdown(tables: Mapping[str, Kind]) -> str:
    """Return the tables as Markdown, with links to the papers."""
    return "\n\n".join(
        "\n".join(
            (f"## {name.capitalize()}: {_code(kind.option)}", "", f"{kind.does.capitalize()}.", "", *_rows(kind))
        )
        for name, kind in tables.items()
    )


def as_json(tables: Mapping[str, Kind]) -> str:
    """Return the methods of every table as JSON."""
    content = {
        name: {
            "option": kind.option,
            "methods": [{"name": method, **asdict(about)} for method, about in kind.methods.items()],
        }
        for name, kind in tables.items()
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


FORMATS = {"text": as_text, "markdown": as_markdown, "json": as_json}


def _table(kind: Kind) -> list[list[str]]:
    """Return the head and the rows of a table, without columns that are empty in all rows."""
    rows = [["name", *asdict(Method("")).keys()]]
    rows += [[name, *asdict(about).values()] for name, about in kind.methods.items()]
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in used] for row in rows]


def _text_rows(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    words = [max(len(word) for cell in column for word in ["", *cell.split()]) for column in zip(*table, strict=True)]
    while sum(widths) + 2 * len(widths) > WIDTH and widths != words:
        # The widest column becomes narrower, as long as its words stay whole.
        widest = max((i for i in range(len(widths)) if widths[i] > words[i]), key=lambda i: widths[i])
        widths[widest] -= 1
    lines = []
    for row in table:
        cells = [
            textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]
            for cell, width in zip(row, widths, strict=True)
        ]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            padded = (part.ljust(width) for part, width in zip(parts, widths, strict=True))
            lines.append(("  " + "  ".join(padded)).rstrip())
    return lines


def _rows(kind: Kind) -> list[str]:
    head, *rows = _table(kind)
    lines = [head, ["---"] * len(head)]
    lines += [[_code(name), *map(_linked, rest)] for name, *rest in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _linked(text: str) -> str:
    return re.sub(r"\b\d{4}\.\d{5}\b", r"[\g<0>](https://arxiv.org/abs/\g<0>)", text).replace("|", "\\|")
