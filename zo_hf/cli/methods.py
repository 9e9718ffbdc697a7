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
from dataclasses import asdict, dataclass

from zo_hf.compatibility.conflict import either
from zo_hf.directions import DISTRIBUTIONS
from zo_hf.estimators import ESTIMATORS
from zo_hf.evaluation.by_rows import BY_ROWS
from zo_hf.method_info import Method
from zo_hf.rules import RULES, ScalarNormalization
from zo_hf.subspaces import SUBSPACES

WIDTH = 100


@dataclass(frozen=True)
class Kind:
    """A table of methods.

    Args:
        option: the option that selects one of the methods.
        does: the common purpose of the methods.
        methods: the methods, by the value of the option.
    """

    option: str
    does: str
    methods: Mapping[str, Method]


OPTIMIZERS = {
    "optim=sgd": Method("ZO-SGD (2305.17333); momentum by optim_args", memory="0; d with momentum"),
    "optim=adamw_torch": Method("ZO-Adam (2402.11592)", memory="2d", needs="a subspace other than full"),
    "any other optim": Method("as in Trainer, without a backward pass", memory="as usual, for d", needs="gradients"),
    "zo_normalize": ScalarNormalization.about,
}

ROWS = {
    "0": Method("all rows, as in MeZO (2305.17333)", memory="0"),
    "k": Method(
        "groups of k rows, from 1 on",
        memory="2Gd",
        needs=", ".join(["a loss that is a sum over rows", *(f"zo_{o}={either(v)}" for o, v in BY_ROWS.items())]),
    ),
    "auto": Method("1 where it is known to pay, else 0", memory="as for k or 0"),
}


def kinds() -> dict[str, Kind]:
    """Return the tables by name, with the present content of the registries."""
    return {
        "estimators": Kind(
            "zo_estimator",
            "how losses become projected gradients",
            {name: entry.about for name, entry in ESTIMATORS.items()},
        ),
        "directions": Kind(
            "zo_direction",
            "the distribution of the directions",
            {name: entry.about for name, entry in DISTRIBUTIONS.items()},
        ),
        "rules": Kind(
            "zo_rule",
            "how the estimate becomes the gradient that the optimizer gets",
            {name: entry.about for name, entry in RULES.items()},
        ),
        "subspaces": Kind(
            "zo_subspace", "which tensors move", {name: entry.about for name, entry in SUBSPACES.items()}
        ),
        "optimizers": Kind("optim, zo_normalize", "how the gradient moves the coordinates", OPTIMIZERS),
        "rows": Kind("zo_rows_per_direction", "the rows of a batch that share a direction", ROWS),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `zo-hf methods`."""
    parser.add_argument("--format", choices=FORMATS, default="text", help="output format (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
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
