"""Acceptability, made by rule: a well-formed sentence, or one with a wrong verb or two words in a wrong order.

A sentence has a subject, often with another noun of the other number in between, a verb that agrees with the subject, an
object and a place, as in "the girls near the old tree like a small dog in the garden .". Half of the ill-formed sentences
have the verb's other number, and half have two neighboring words exchanged.
"""

from __future__ import annotations

import random

PEOPLE = ("girl", "boy", "king", "farmer", "teacher", "cat", "dog", "bird", "bear", "friend")
THINGS = ("tree", "house", "box", "ball", "boat", "table", "flower", "stone", "cake", "book")
ADJECTIVES = ("big", "small", "old", "red", "happy", "new", "sad", "quiet", "funny", "little")
VERBS = ("like", "see", "want", "find", "hold", "paint", "move", "need", "know", "love")
PLACES = ("in the garden", "at the park", "near the river", "on the hill", "in the kitchen", "at school")
NEAR = ("near", "behind", "under", "beside")


def acceptability(generator: random.Random, label: int) -> tuple[str, str]:
    """Return an ill-formed sentence (label 0) or a well-formed one (label 1)."""
    pick, plural = generator.choice, generator.random() < 0.5
    subject = ["the", pick(ADJECTIVES), _noun(pick(PEOPLE), plural)]
    if generator.random() < 0.5:
        subject += [pick(NEAR), "the", _noun(pick(THINGS), not plural)]
    wrong_verb = label == 0 and generator.random() < 0.5
    verb = pick(VERBS) + ("s" if plural == wrong_verb else "")
    words = [*subject, verb, "the", pick(ADJECTIVES), pick(THINGS), *pick(PLACES).split()]
    if label == 0 and not wrong_verb:
        # No two neighbors are of one kind, so no exchange leaves a well-formed sentence.
        at = generator.randrange(len(words) - 1)
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join([*words, "."]), ""


def _noun(noun: str, plural: bool) -> str:
    if not plural:
        return noun
    return noun + ("es" if noun == "box" else "s")
