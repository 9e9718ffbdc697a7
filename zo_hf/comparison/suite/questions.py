"""The type of a question, made by rule: whether it asks for a person, a place, a number or a time.

Some say so by a question word, as in "who painted the old house ?", and others by a noun, as in "tell me the day when she
painted the old house ?". The rest of a question tells nothing.
"""

from __future__ import annotations

import random

ASKING = (
    ("who", "which girl", "which king", "tell me the name of the man who"),
    (
        "where is it that he",
        "in which town is it that she",
        "tell me the country where he",
        "in which house is it that she",
    ),
    (
        "how many times is it that he",
        "how often is it that she",
        "tell me the number of friends who",
        "how many children",
    ),
    (
        "when is it that she",
        "in which year is it that he",
        "tell me the day when she",
        "on which morning is it that he",
    ),
)
VERBS = ("painted", "found", "built", "lost", "saw", "moved", "opened", "hid", "cleaned", "sold")
ADJECTIVES = ("old", "red", "big", "small", "new", "green", "funny", "broken", "lovely", "strange")
THINGS = ("house", "boat", "box", "book", "tree", "ball", "door", "cake", "bridge", "clock")


def question(generator: random.Random, label: int) -> tuple[str, str]:
    """Return a question for a person (0), a place (1), a number (2) or a time (3)."""
    pick = generator.choice
    return f"{pick(ASKING[label])} {pick(VERBS)} the {pick(ADJECTIVES)} {pick(THINGS)} ?", ""
