"""Prompts that ask for JSON, and a reward for the form of an answer.

A prompt is "Mia is 7 years old." and "As JSON with the keys "name" and "age":". The full reward is for an answer that
`json.loads` reads as an object with these two keys and no other. A part of it is for an answer that begins with a brace, and
for each key, because a reward that is always 0 has no slope. Names of the test are not in the training prompts.
"""

import json
import random
from typing import Any

from datasets import Dataset

#: Tokens of an answer; one over several lines takes about 18.
TOKENS = 20
PROMPT = '{name} is {age} years old.\nAs JSON with the keys "name" and "age":'
TRAIN_NAMES = (
    "Ada Ali Amy Ana Ben Bob Carl Clara Dan David Dora Ella Emil Eric Eva Finn Frank George Hugo Ida Igor Ivan Jack James "
    "Jane Joe John Julia Karl Kate Kim Laura Leo Lily Lisa Luis Maria Mark Mary Max Mia Mike Nina Noah Olga Oscar Paul Peter"
)
HELD_OUT_NAMES = "Alan Anna Bill Diana Emma Fred Grace Helen Ian Jim Lucy Nora Omar Rita Sam Sara Tina Tom Victor Zoe"
AGES = range(2, 90)


def is_answer(text: str) -> bool:
    """Return True for the JSON of an object that has the two keys and no other."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == {"name", "age"}


def form(completions: list[str], **_: Any) -> list[float]:
    """Return 1 for an answer of the right form, and else a quarter for a brace in front and for each key."""
    return [1.0 if is_answer(text) else _part(text) for text in completions]


def _part(text: str) -> float:
    return (text.lstrip().startswith("{") + ('"name":' in text) + ('"age":' in text)) / 4


def parses(completions: list[str], **_: Any) -> list[float]:
    """Return 1 for an answer of the right form, and else 0; only reported."""
    return [float(is_answer(text)) for text in completions]


def is_right(completions: list[str], name: list[str], age: list[int], **_: Any) -> list[float]:
    """Return 1 for an answer of the right form with the right values, and else 0; only reported."""
    rows = zip(completions, name, age, strict=True)
    return [float(is_answer(text) and json.loads(text) == {"name": n, "age": a}) for text, n, a in rows]


def prompts(names: str, count: int, seed: int) -> Dataset:
    """Return prompts about these names, with the values that an answer should have."""
    draw = random.Random(seed)
    rows = [{"name": draw.choice(names.split()), "age": draw.choice(AGES)} for _ in range(count)]
    return Dataset.from_list([row | {"prompt": PROMPT.format(**row)} for row in rows])
