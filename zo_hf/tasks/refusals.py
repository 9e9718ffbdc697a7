"""Wrong arguments of a command: one sentence on standard error and exit code 2, without a traceback.

The loss of another process, and one that was started differently, are one sentence and exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zo_hf.parallel.lost_ranks import RankLost, naming_lost_ranks
from zo_hf.parallel.ranks import ReplicasDiffer
from zo_hf.tasks.assets import AssetError
from zo_hf.trainer.finite_weights import WeightsNotFinite


class FirstStep(TrainerCallback):
    """A callback that notes the end of the first optimizer step.

    Attributes:
        is_done: True after the first step.
    """

    def __init__(self) -> None:
        self.is_done = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that a step has ended."""
        self.is_done = True


@contextmanager
def wrong_arguments_end_the_command() -> Iterator[None]:
    """End the command if options cannot be parsed, or the model or the data they name cannot be loaded.

    A process of the run that is lost, or was started with other options, ends it, too.
    """
    try:
        with naming_lost_ranks():
            yield
    except (AssetError, ImportError, OSError, ValueError) as error:
        _end_command(error)
    except (RankLost, ReplicasDiffer) as error:
        _end_command(error, code=1)


@contextmanager
def refusals_end_the_command() -> Iterator[FirstStep]:
    """End the command if this package refuses an argument before the first step has ended, or to save broken weights.

    It also ends if a process of the run is lost or trains apart.

    All other exceptions pass, so that a bug keeps its traceback.

    Yields:
        A callback for the trainer.
    """
    first_step = FirstStep()
    try:
        with naming_lost_ranks():
            yield first_step
    except ValueError as error:
        if first_step.is_done or not is_refusal(error):
            raise
        _end_command(error)
    except (RankLost, ReplicasDiffer, WeightsNotFinite) as error:
        _end_command(error, code=1)


def is_refusal(error: ValueError) -> bool:
    """Return whether this package raised the error to refuse an argument.

    A refusal is raised in this package, and its message is a sentence. The messages of Python's own errors, which a
    bug in this package may cause, have no period at the end.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "zo_hf" and str(error).endswith(".")


def _end_command(error: Exception, code: int = 2) -> NoReturn:
    text = " ".join(str(error).split())  # other libraries write several lines
    print(f"error: {text}" if text.endswith(".") else f"error: {text}.", file=sys.stderr)
    raise SystemExit(code) from error
