"""A task of the suite: labeled texts, the words that answer, and three parts without a text in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from zo_hf.tasks.prompts import Prompt

#: The seed of every split, the same for every run: seeds of runs decide the order and the directions alone.
DATA_SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a task's parts.

    Attributes:
        train: maximum number of training texts.
        held_out: maximum number of development texts, and of test texts.
        max_words: maximum number of words in a text that is not made by rule.
    """

    train: int
    held_out: int
    max_words: int


@dataclass(frozen=True)
class Parts:
    """The parts of a task, data sets with the columns `text` (str), `pair` (str) and `label` (int, from 0).

    `pair` is the second text of a task about two texts, else empty. No text with its pair is in two parts.

    Attributes:
        train: what methods train on.
        development: what chooses learning rates.
        test: what every figure of a report is about.
    """

    train: Dataset
    development: Dataset
    test: Dataset


@dataclass(frozen=True)
class TextTask:
    """A classification of texts.

    Attributes:
        summary: the task in words, for help and documentation.
        template: the prompt, with `{text}` once, and `{pair}` if there are two texts.
        words: the word that answers for label 0, 1, ..., with its leading space unless a line ends before it.
        load: returns the parts, given their sizes; raises ValueError if there are too few texts.
    """

    summary: str
    template: str
    words: tuple[str, ...]
    load: Callable[[Sizes], Parts]

    def prompt(self, pair: str = "N/A") -> Prompt:
        """Return the prompt of a text with the given second text."""
        return Prompt(self.template.replace("{pair}", pair), self.words)

    def max_tokens(self, max_words: int) -> int:
        """Return the number of tokens to which a text is cut together with its prompt."""
        return max(64, 4 * (max_words + 1)) * (2 if "{pair}" in self.template else 1)


def parts_of(rows: Dataset, sizes: Sizes, name: str) -> Parts:
    """Return training, development and test rows from one table of shuffled, distinct rows.

    Raises:
        ValueError: a part would be empty.
    """
    held_out = min(sizes.held_out, len(rows) // 4)
    train = min(sizes.train, len(rows) - 2 * held_out)
    if not held_out or not train:
        raise ValueError(f"task {name} has only {len(rows)} texts for its three parts; raise --max-words.")
    return Parts(
        train=rows.select(range(2 * held_out, 2 * held_out + train)),
        development=rows.select(range(held_out)),
        test=rows.select(range(held_out, 2 * held_out)),
    )
