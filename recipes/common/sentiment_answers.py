"""Reviews as prompts, and a reward for the word that answers them."""

from typing import Any

from datasets import Dataset

from zo_hf.tasks.prompts import Prompt


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 for the right word, and 0 for any other text."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def as_prompts(rows: Dataset, prompt: Prompt) -> Dataset:
    """Return sentences as prompts, each with its right answer."""
    return rows.map(
        lambda row: {"prompt": prompt.fill(row["text"]), "answer": prompt.verbalizers[row["label"]]},
        remove_columns=rows.column_names,
    )
