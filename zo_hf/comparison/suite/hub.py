"""Tasks of GLUE and SuperGLUE, where a model hub is at hand, with MeZO's prompts (arXiv 2305.17333, table 14).

Test texts are from the validation split, because labels of the test split are not published. Development and training texts
are from the training split. COPA is a choice between two words, so that every task is a classification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, load_dataset

from zo_hf.comparison.suite.task import DATA_SEED, Parts, Sizes
from zo_hf.tasks.loading import loaded

Row = Mapping[str, Any]


def from_hub(
    path: str, name: str | None, text: Callable[[Row], str], pair: Callable[[Row], str], label: str = "label"
) -> Callable[[Sizes], Parts]:
    """Return the `load` of a task on the hub.

    Args:
        path: the data set.
        name: its configuration.
        text: the text of a row.
        pair: the second text of a row; "" if there is none.
        label: the column of labels.
    """

    def load(sizes: Sizes) -> Parts:
        remedy = "run it where the hub is at hand, or choose other --tasks"
        splits = loaded(f"data set {path} {name or ''}".rstrip(), lambda: load_dataset(path, name), remedy)
        seen: set[tuple[str, str]] = set()

        def rows(split: str, number: int) -> Dataset:
            chosen: list[dict[str, Any]] = []
            for row in splits[split].shuffle(seed=DATA_SEED):
                texts = text(row), pair(row)
                if texts not in seen:
                    seen.add(texts)
                    chosen.append({"text": texts[0], "pair": texts[1], "label": int(row[label])})
                if len(chosen) == number:
                    break
            return Dataset.from_list(chosen)

        test = rows("validation", sizes.held_out)
        other = rows("train", sizes.train + sizes.held_out)
        development = min(sizes.held_out, len(other) // 3)
        return Parts(other.select(range(development, len(other))), other.select(range(development)), test)

    return load


def copa_question(row: Row) -> str:
    """Return the two choices of a row of COPA as a question about its premise."""
    asked = "cause" if row["question"] == "cause" else "result"
    return f"What was the {asked}? First: {row['choice1']} Second: {row['choice2']}"
