"""`forward_only`: other Trainer subclasses without a backward pass.

    ZOMyTrainer, ZOMyConfig = forward_only(MyTrainer, MyConfig)

TRL's trainers and their subclasses get what the ready-made pairs have: a direction for every row where the loss comes apart.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer, TrainingArguments

from zo_hf.trainer.forward_only import make_forward_only
from zo_hf.trl.by_rows import ByRows
from zo_hf.trl.trainers import READY, REFUSED, kinds_of


def forward_only(trainer: type[Trainer], config: type[TrainingArguments]) -> tuple[Any, Any]:
    """Make a Trainer subclass and its config forward-only.

    Args:
        trainer: a subclass of `transformers.Trainer`.
        config: the class of its arguments, `transformers.TrainingArguments` or a subclass.

    Returns:
        The two classes, named `ZO...` after the given ones. The config has the options and defaults of `config`, and the
        `zo_*` options. The options about gradients (`ABOUT_GRADIENTS`) are those of `ZOConfig`. Where the trainer is one of
        TRL that samples completions, or inherits from one, every call of the first class raises a ValueError. Its message
        names the way out.

    Raises:
        TypeError: an argument is not such a subclass; the message names it.
    """
    is_trainer = isinstance(trainer, type) and issubclass(trainer, Trainer)
    return make_forward_only(_prepared(trainer) if is_trainer else trainer, config)  # type: ignore[arg-type]


def _prepared(trainer: type[Trainer]) -> type[Trainer]:
    kind = next((name for name in kinds_of(trainer) if name in REFUSED), None)
    return _by_rows(trainer) if kind is None else _refusing(trainer, kind)  # type: ignore[arg-type]


@functools.cache
def _refusing(trainer: type[Trainer], kind: str) -> type[Trainer]:
    """Return a subclass that refuses to be made, so that a script which only names the class still runs.

    Args:
        trainer: a trainer that samples completions.
        kind: a name of `REFUSED`.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"trainer={trainer.__name__} does not train without a backward pass: TRL's {kind}Trainer {REFUSED[kind]}."
        )

    return type(trainer.__name__, (trainer,), {"__init__": __init__, "__module__": __name__})


@functools.cache
def _by_rows(trainer: type[Trainer]) -> type[Trainer]:
    """Return a trainer with the loss of TRL by rows if it has such a loss, and any other trainer as it is."""
    ready = next((READY[name] for name in kinds_of(trainer) if name in READY), None)
    if ready is None or not ready.by_rows or issubclass(trainer, ByRows):
        return trainer
    return type(trainer.__name__, (ByRows, trainer), {"has_pairs": ready.has_pairs, "__module__": __name__})
