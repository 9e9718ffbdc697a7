"""Forward-only classes of any Trainer subclass and its config.

In the new class, `ZOTrainer` stands under the subclass in the method resolution order:

    ZOMyTrainer -> MyTrainer -> ZOTrainer -> Trainer

So the subclass keeps everything that it does, and its `super()` calls reach the forward-only step.
"""

from __future__ import annotations

import functools
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from transformers import Trainer, TrainingArguments

from zo_hf.trainer.config import ZOConfig
from zo_hf.trainer.trainer import ZOTrainer

#: Options about gradients. Their defaults are those of `ZOConfig`, not those of the subclass's config.
ABOUT_GRADIENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_grad_norm",
    "gradient_checkpointing",
    "activation_checkpointing",
)


def make_forward_only(trainer: type[Trainer], config: type[TrainingArguments]) -> tuple[Any, Any]:
    """Make the two classes that `zo_hf.forward_only` returns, whatever the trainer is; two calls give the same ones.

    Raises:
        TypeError: an argument is not a subclass of `Trainer` or `TrainingArguments`; the message names it.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise TypeError(f"trainer={trainer!r} is not a subclass of transformers.Trainer; pass the class itself.")
    if not (isinstance(config, type) and issubclass(config, TrainingArguments)):
        raise TypeError(
            f"config={config!r} is not a subclass of transformers.TrainingArguments; pass the class itself."
        )
    return _trainer_class(trainer), _config_class(config)  # type: ignore[arg-type]


@functools.cache
def _trainer_class(trainer: type[Trainer]) -> type[ZOTrainer]:
    if issubclass(trainer, ZOTrainer):
        return trainer
    bases = (ZOTrainer,) if trainer is Trainer else (trainer, ZOTrainer)
    doc = f"`{trainer.__name__}` with the backward pass replaced by forward passes; see `ZOTrainer`."
    made: Any = type(f"ZO{trainer.__name__}", bases, {"__doc__": doc, "__module__": __name__})

    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        # The subclass may write a card of its own, without a call of ZOTrainer's method.
        with self.arguments_as_used():
            super(made, self).create_model_card(*args, **kwargs)
        self.describe_training_in_card()

    made.create_model_card = create_model_card
    return made


@functools.cache
def _config_class(config: type[TrainingArguments]) -> type[ZOConfig]:
    if issubclass(config, ZOConfig):
        return config
    if issubclass(ZOConfig, config):
        return ZOConfig
    ours = {option.name: option for option in fields(ZOConfig)}
    theirs = {option.name for option in fields(config)}
    kept = [ours[name] for name in ABOUT_GRADIENTS if name in ours and name in theirs]
    namespace: dict[str, Any] = {
        "__doc__": f"Arguments of `{config.__name__}` and of `ZOConfig`.",
        "__module__": __name__,
        "__annotations__": {option.name: option.type for option in kept},
        **{option.name: _copy(option) for option in kept},
        # The made class has no name that an import finds, so training_args.bin refers to the given one.
        "__reduce__": lambda self: (_empty, (config,), dict(vars(self))),
    }
    return dataclass(type(f"ZO{config.__name__}", (config, ZOConfig), namespace))


def _empty(config: type[TrainingArguments]) -> Any:
    """Return an object of the class made from a config, without values: what pickle fills."""
    made = _config_class(config)  # type: ignore[arg-type]
    return made.__new__(made)


def _copy(option: Field) -> Any:
    metadata = dict(option.metadata)
    if option.default_factory is not MISSING:
        return field(default_factory=option.default_factory, metadata=metadata)
    return field(default=option.default, metadata=metadata)
