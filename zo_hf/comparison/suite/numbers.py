"""A comparison of two numbers, made by rule: who has more, the first or the second.

The numbers are between 1 and 99 and differ. Thing and names are drawn, too, and tell nothing.
"""

from __future__ import annotations

import random

NAMES = ("Tom", "Lily", "Ben", "Anna", "Max", "Mia", "Sam", "Sue", "Tim", "Lucy")
THINGS = ("apples", "books", "balls", "flowers", "cakes", "stones", "toys", "boxes")


def more(generator: random.Random, label: int) -> tuple[str, str]:
    """Return a sentence in which the first (0) or the second (1) has more."""
    first, second = generator.sample(NAMES, 2)
    low, high = sorted(generator.sample(range(1, 100), 2))
    left, right = (high, low) if label == 0 else (low, high)
    return f"{first} has {left} and {second} has {right} {generator.choice(THINGS)} .", ""
