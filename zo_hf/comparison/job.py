"""The settings that identify a run: a problem, and what a method does with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

#: The ways to put a task to a model: with a prompt and label words, or as the bare text with a fresh or a fitted head.
ALIGNMENTS = ("prompt", "head", "fitted")
#: Stands in place of an alignment where a network starts from random weights.
SCRATCH = "scratch"


@dataclass(frozen=True)
class Problem:
    """A model, a task, and how the one is put to the other.

    Attributes:
        model: a folder or a name of a language model; "" if the task has a network of its own.
        task: a name of the suite.
        alignment: "prompt", "head", "fitted", or "scratch" for a task with a network of its own.
        batch_size: rows in a forward pass.
        train_rows: maximum number of training rows.
        eval_rows: maximum number of development rows, and of test rows.
        max_words: maximum number of words in a text that is not made by rule.
        loss: with a prompt, "label_words" compares the label words alone, and "vocabulary" is the model's own loss of the
            label word.
    """

    model: str
    task: str
    alignment: str
    batch_size: int
    train_rows: int
    eval_rows: int
    max_words: int
    loss: str

    @property
    def name(self) -> str:
        """The task and its alignment, in words."""
        kinds = {"prompt": "prompt", "head": "bare text, fresh head", "fitted": "bare text, fitted head"}
        kinds[SCRATCH] = "from scratch"
        return f"{self.task}, {kinds[self.alignment]}"


def titles(problems: Sequence[Problem]) -> list[str]:
    """Return the name of each problem, after that of its model if there are several models."""
    several = len({problem.model for problem in problems if problem.model}) > 1
    return [
        f"{Path(problem.model).name}: {problem.name}" if several and problem.model else problem.name
        for problem in problems
    ]


@dataclass(frozen=True)
class Job(Problem):
    """A run of a method.

    Attributes:
        method: the method's name for display.
        options: JSON of the options of ZOConfig, except the learning rate; `"backward": true` is a plain Trainer.
        learning_rate: the constant learning rate.
        seed: seed of the order of rows, of the directions, and of fresh weights.
        budget: maximum number of forward passes of a batch; 0 evaluates the untrained model.
        evaluations: how often the test rows are scored during the run; 0 scores the development rows at the end.
    """

    method: str
    options: str
    learning_rate: float
    seed: int
    budget: int
    evaluations: int

    @property
    def passes(self) -> int:
        """The forward passes of a batch that the run makes at most, those for its scores included."""
        return self.budget + max(self.evaluations, 1) * math.ceil(self.eval_rows / self.batch_size)


SETTINGS = tuple(field.name for field in fields(Job))
