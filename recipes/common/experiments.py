"""Shared code of recipes that compare many short runs: encoded sentences, and a file of finished runs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from zo_hf.tasks.data import embedded_reviews
from zo_hf.tasks.prompts import PROMPT_A, encode_example, label_token_ids
from zo_hf.trainer.output_paths import check_file
from zo_hf.untrusted import plain_json


def encoded_reviews(
    tokenizer: PreTrainedTokenizerBase, num_train: int, num_held_out: int, seed: int, words: range
) -> tuple[Dataset, Dataset]:
    """Return embedded sentences as training and held-out examples, whose only label is the label word.

    Args:
        tokenizer: encodes the sentences.
        num_train: maximum number of training sentences.
        num_held_out: maximum number of held-out sentences.
        seed: determines the selection.
        words: the allowed numbers of words in a sentence.
    """
    sentences = embedded_reviews(num_train, num_held_out, seed, words)
    label_ids = label_token_ids(tokenizer, PROMPT_A)

    def encode(rows: Dataset) -> Dataset:
        return Dataset.from_list(
            [encode_example(tokenizer, PROMPT_A, row["text"], label_ids[row["label"]], 4 * words.stop) for row in rows]
        )

    return encode(sentences.train), encode(sentences.held_out)


class FinishedRuns:
    """A file of finished runs, one line of JSON each, from which an interrupted comparison continues.

    Args:
        path: the file; its folder is created.
        settings: the names of the settings that identify a run.
        only_read: True if no run will be added.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: Path, settings: Sequence[str], only_read: bool = False) -> None:
        self._path, self._settings = path, tuple(settings)
        if not only_read:
            check_file("--output", path)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text and not only_read:  # the process was killed while it wrote a line
            path.write_text(complete, encoding="utf-8")
        try:
            # Losses may not be finite, and Python writes them as they are.
            runs = [plain_json.parse(line.encode(), finite=False) for line in complete.splitlines()]
            self._runs = {self._key(run): run for run in runs}
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} holds lines that no comparison writes; move it away to start anew.") from error

    def find(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the finished run with these settings, or None."""
        return self._runs.get(self._key(settings))

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run, which holds its settings and its results."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        self._runs[self._key(run)] = run

    def _key(self, run: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(run[name] for name in self._settings)


def finished_runs_are_kept() -> str:
    """Return what an interrupted comparison has left behind."""
    return "the finished runs are kept, and the same command continues with the next"


class StopWhenDiverged(TrainerCallback):
    """Ends a run when its logged loss exceeds a limit or is NaN.

    Attributes:
        limit: the limit; to be set before training.
    """

    limit = math.inf

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Check the logged loss."""
        control.should_training_stop |= not logs.get("loss", 0.0) < self.limit
