"""A table of prompts, answers and rewards in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.import_utils import is_rich_available

from zo_hf.rewards.prompts import is_conversation


@dataclass(frozen=True)
class AnsweredPrompts:
    """The answers of a batch.

    Args:
        prompts: the prompt of every answer.
        completions: every answer, as reward functions got it.
        rewards: rewards of every answer, by the function's name.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    rewards: Mapping[str, Sequence[float]]

    def show(self, step: int, limit: int | None) -> None:
        """Print the answers.

        Args:
            step: number of steps so far, for the title.
            limit: number of rows; None prints all.
        """
        columns = ["prompt", "completion", *self.rewards]
        numbers = [[f"{value:.2f}" for value in values] for values in self.rewards.values()]
        texts = ([_text(entry) for entry in entries] for entries in (self.prompts, self.completions))
        rows = list(zip(*texts, *numbers, strict=True))[:limit]
        if not is_rich_available():
            print(f"step {step}: {' | '.join(columns)}", *(" | ".join(row) for row in rows), sep="\n")
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, title=f"step {step}", show_lines=True, expand=True)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)


def _text(entry: Any) -> str:
    if not is_conversation(entry):
        return str(entry)
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in entry)
