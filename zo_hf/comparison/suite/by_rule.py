"""Rows made by a rule: a generator of its own, no text twice, and labels in turn, so that parts are balanced."""

from __future__ import annotations

import random
from collections.abc import Callable

from datasets import Dataset

from zo_hf.comparison.suite.task import DATA_SEED, Parts, Sizes

#: Returns a text and its second text, given a random generator and the label that they shall have.
Rule = Callable[[random.Random, int], tuple[str, str]]

#: Attempts for one new text, after which a rule counts as exhausted.
ATTEMPTS = 1000


def made_by(rule: Rule, labels: int, name: str) -> Callable[[Sizes], Parts]:
    """Return the `load` of a task whose texts a rule makes.

    Rows are drawn one after the other: first test, then development, then training rows. So held-out rows do not depend on
    the number of training rows.

    Args:
        rule: makes a text for a label.
        labels: number of labels.
        name: the task's name, for errors and for its random numbers.
    """

    def load(sizes: Sizes) -> Parts:
        # Of Python's own generator, whose numbers from a text seed are the same on every machine and version.
        generator, seen = random.Random(f"{name} {DATA_SEED}"), set[tuple[str, str]]()

        def rows(number: int) -> Dataset:
            made = [(_new_row(rule, generator, row % labels, seen, name), row % labels) for row in range(number)]
            generator.shuffle(made)
            return Dataset.from_list([{"text": text, "pair": pair, "label": label} for (text, pair), label in made])

        test, development = rows(sizes.held_out), rows(sizes.held_out)
        return Parts(rows(sizes.train), development, test)

    return load


def _new_row(
    rule: Rule, generator: random.Random, label: int, seen: set[tuple[str, str]], name: str
) -> tuple[str, str]:
    for _ in range(ATTEMPTS):
        row = rule(generator, label)
        if row not in seen:
            seen.add(row)
            return row
    raise ValueError(
        f"the rule of task {name} makes no more than {len(seen)} texts; lower --train-rows or --eval-rows, or leave the task out."
    )
