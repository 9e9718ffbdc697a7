"""What recipes that compare many short runs share: encoded sentences, and a file of finished runs to continue from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, encode_example, label_token_ids


def encoded_reviews(
    tokenizer: PreTrainedTokenizerBase, num_train: int, num_held_out: int, seed: int, words: range
) -> tuple[Dataset, Dataset]:
    """Embedded sentences as training examples whose one label is the label word, and held-out ones.

    Args:
        words: numbers of words that a sentence may have.
    """
    sentences = embedded_reviews(num_train, num_held_out, seed, words)
    label_ids = label_token_ids(tokenizer, PROMPT_A)

    def encode(rows: Dataset) -> Dataset:
        return Dataset.from_list(
            [encode_example(tokenizer, PROMPT_A, row["text"], label_ids[row["label"]], 4 * words.stop) for row in rows]
        )

    return encode(sentences.train), encode(sentences.held_out)


class FinishedRuns:
    """Runs that are done, a line of JSON each, so that an interrupted comparison continues where it stopped.

    Args:
        path: the file; its folder is made.
        asked: the names of what identifies a run.
    """

    def __init__(self, path: Path, asked: Sequence[str]) -> None:
        self._path, self._asked = path, tuple(asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # killed while it wrote a line
            path.write_text(whole, encoding="utf-8")
        lines = whole.splitlines()
        self._runs = {self._key(run): run for run in map(json.loads, lines)}

    def find(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """The run that was asked for, or None if it has not been made."""
        return self._runs.get(self._key(asked))

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run, which holds what was asked and what came of it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self._runs[self._key(run)] = run

    def _key(self, run: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in self._asked)
