"""Every method there is: its paper, its cost, and what it needs.

    zo-hf methods                        a table for every option that chooses a method
    zo-hf methods --format markdown      the same for a document
    zo-hf methods --format json          the same for a program

A run combines one entry of each table:

    trainer = ZOTrainer(model, ZOConfig("out", zo_estimator=..., zo_direction=..., zo_rule=..., zo_subspace=...))

forwards   forward passes of a step, with q = zo_num_directions
memory     numbers held beyond the model's weights, with d coordinates, matrices of m x n, and rank r
needs      what it cannot do without
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.method import Method
from zo_hf.optimizers import RULES, ScalarNormalisation
from zo_hf.subspaces import SUBSPACES

WIDTH = 100


@dataclass(frozen=True)
class Kind:
    """One table.

    Args:
        option: what chooses among its methods.
        does: what all of them are for.
        methods: by the name that the option takes.
    """

    option: str
    does: str
    methods: Mapping[str, Method]


OPTIMIZERS = {
    "optim=sgd": Method("ZO-SGD (2305.17333); momentum by optim_args", memory="0; d with momentum"),
    "optim=adamw_torch": Method("ZO-Adam (2402.11592)", memory="2d", needs="a subspace other than full"),
    "any other optim": Method("Trainer's own, without a backward pass", memory="as usual, of d", needs="gradients"),
    "zo_normalize": ScalarNormalisation.about,
}


def kinds() -> dict[str, Kind]:
    """The tables, by name, as the registries are at this moment."""
    return {
        "estimators": Kind(
            "zo_estimator",
            "how losses become projected gradients",
            {name: entry.about for name, entry in ESTIMATORS.items()},
        ),
        "directions": Kind(
            "zo_direction",
            "what directions are drawn from",
            {name: entry.about for name, entry in DISTRIBUTIONS.items()},
        ),
        "rules": Kind(
            "zo_rule",
            "what the estimate goes through before the optimizer gets it",
            {name: entry.about for name, entry in RULES.items()},
        ),
        "subspaces": Kind(
            "zo_subspace", "which tensors move", {name: entry.about for name, entry in SUBSPACES.items()}
        ),
        "optimizers": Kind("optim, zo_normalize", "what moves the coordinates", OPTIMIZERS),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf methods`."""
    parser.add_argument("--format", choices=FORMATS, default="text", help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    print(FORMATS[args.format](kinds()))


def as_text(tables: Mapping[str, Kind]) -> str:
    """Tables of at most `WIDTH` characters; what is longer goes on in the next line of its column."""
    return "\n\n".join(
        "\n".join((f"{name} ({kind.option}): {kind.does}", "", *_text_rows(_table(kind))))
        for name, kind in tables.items()
    )


def as_markdown(tables: Mapping[str, Kind]) -> str:
    """The same as Markdown, papers linked."""
    return "\n\n".join(
        "\n".join(
            (f"## {name.capitalize()}: {_code(kind.option)}", "", f"{kind.does.capitalize()}.", "", *_rows(kind))
        )
        for name, kind in tables.items()
    )


def as_json(tables: Mapping[str, Kind]) -> str:
    """A list of methods for every kind."""
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
    """Head and rows, without the columns that are empty for all of them."""
    rows = [["name", *asdict(Method("")).keys()]]
    rows += [[name, *asdict(about).values()] for name, about in kind.methods.items()]
    used = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in used] for row in rows]


def _text_rows(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    words = [max(len(word) for cell in column for word in ["", *cell.split()]) for column in zip(*table, strict=True)]
    while sum(widths) + 2 * len(widths) > WIDTH and widths != words:
        # The widest column gives way, as long as its words stay whole.
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
