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
        `zo_*` options. The options about gradients (`ABOUT_GRADIENTS`) are those of `ZOConfig`.

    Raises:
        TypeError: an argument is not such a subclass; the message names it.
        ValueError: it is a trainer of TRL that samples completions, or inherits from one; the message names the way out.
    """
    is_trainer = isinstance(trainer, type) and issubclass(trainer, Trainer)
    kind = next((name for name in kinds_of(trainer) if name in REFUSED), None) if is_trainer else None
    if kind is not None:
        raise ValueError(
            f"trainer={trainer.__name__} does not train without a backward pass: TRL's {kind}Trainer {REFUSED[kind]}."
        )
    return make_forward_only(_by_rows(trainer) if is_trainer else trainer, config)  # type: ignore[arg-type]


@functools.cache
def _by_rows(trainer: type[Trainer]) -> type[Trainer]:
    """Return a trainer with the loss of TRL by rows if it has such a loss, and any other trainer as it is."""
    ready = next((READY[name] for name in kinds_of(trainer) if name in READY), None)
    if ready is None or not ready.by_rows or issubclass(trainer, ByRows):
        return trainer
    return type(trainer.__name__, (ByRows, trainer), {"has_pairs": ready.has_pairs, "__module__": __name__})
