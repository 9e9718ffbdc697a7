"""Entailment, made by rule: what quantifiers and negation say about one member of a group.

A premise says that all, no or only some of a group have a property, and that somebody belongs to the group. The hypothesis
gives that person the property, denies it, or is about another property:

    all the cats are red . Tom is a cat .       Tom is red       yes
    no cats are red . Tom is a cat .            Tom is red       no
    some of the cats are red . Tom is a cat .   Tom is red       maybe
    all the cats are red . Tom is a cat .       Tom is big       maybe

So neither the quantifier nor the negation alone decides.
"""

from __future__ import annotations

import random

NAMES = (
    "Tom",
    "Lily",
    "Ben",
    "Anna",
    "Max",
    "Mia",
    "Sam",
    "Sue",
    "Tim",
    "Lucy",
    "Jack",
    "Sara",
    "Bob",
    "Amy",
    "Leo",
    "Kate",
)
GROUPS = ("cat", "dog", "bird", "bear", "fish", "duck", "frog", "mouse", "horse", "pig")
PLURALS = ("cats", "dogs", "birds", "bears", "fish", "ducks", "frogs", "mice", "horses", "pigs")
PROPERTIES = (
    "red",
    "big",
    "happy",
    "old",
    "sad",
    "small",
    "green",
    "fast",
    "kind",
    "loud",
    "blue",
    "slow",
    "wet",
    "brave",
)

YES, NO, MAYBE = 0, 1, 2


def entailment(generator: random.Random, label: int) -> tuple[str, str]:
    """Return a premise and a hypothesis whose answer is yes (0), no (1) or maybe (2)."""
    kind, name = generator.randrange(len(GROUPS)), generator.choice(NAMES)
    said, other = generator.sample(PROPERTIES, 2)
    denied = generator.random() < 0.5
    if label == MAYBE:
        quantifier, asked = generator.choice([("all the", other), ("no", other), ("some of the", said)])
    else:
        # "All" and a plain hypothesis, or "no" and a denied one, agree.
        quantifier, asked = ("no" if denied == (label == YES) else "all the"), said
    premise = f"{quantifier} {PLURALS[kind]} are {said} . {name} is a {GROUPS[kind]} ."
    return premise, f"{name} is {'not ' if denied else ''}{asked}"
