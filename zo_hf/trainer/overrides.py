"""Methods of Trainer that a subclass overrides, and those that it overrides in a way that cannot work here."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from transformers import Seq2SeqTrainer, Trainer

#: Contexts of Trainer around its loss.
CONTEXTS = ("compute_loss_context_manager", "autocast_smart_context_manager")


def overrides(trainer: Trainer, name: str) -> bool:
    """Return True if a method is not transformers' own code, because of a subclass or on the object itself."""
    method = getattr(trainer, name)
    stock = [getattr(kind, name) for kind in (Trainer, Seq2SeqTrainer)]
    return getattr(method, "__func__", method) not in stock


def has_stock_loss(trainer: Trainer) -> bool:
    """Return True if a Trainer's loss is transformers' own code."""
    return trainer.compute_loss_func is None and not overrides(trainer, "compute_loss")


def has_stock_contexts(trainer: Trainer) -> bool:
    """Return True if a Trainer evaluates its loss in no context of a subclass."""
    return not any(overrides(trainer, name) for name in CONTEXTS)


class NoBackward:
    """Refuses a backward pass of a subclass, and a step that the engine has not seen.

    Args:
        trainer: the Trainer; its class is named in errors.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._kind = type(trainer).__name__
        self._accelerator: Accelerator | None = None
        self._has_estimate = False
        self._estimated_step: int | None = None

    def watch(self, accelerator: Accelerator) -> None:
        """Refuse `accelerator.backward` from now on."""
        self._accelerator, self._has_estimate, self._estimated_step = accelerator, False, None
        accelerator.backward = self._refuse

    def leave(self) -> None:
        """Let `accelerator.backward` be as it was."""
        if self._accelerator is not None:
            vars(self._accelerator).pop("backward", None)
        self._accelerator = None

    def estimated(self, step: int) -> None:
        """Note that the engine has an estimate for the next step of the optimizer.

        Args:
            step: number of the step.

        Raises:
            ValueError: the step has an estimate already, which would be lost.
        """
        if step == self._estimated_step:
            raise ValueError(
                f"{self._kind}.training_step calls super().training_step() again for a micro-batch, and only the last call "
                "would count; let compute_loss return the sum of the losses, and call it once."
            )
        self._has_estimate, self._estimated_step = True, step

    def check_step(self) -> None:
        """Refuse a step of the optimizer without an estimate.

        Raises:
            ValueError: the engine has no estimate.
        """
        if not self._has_estimate:
            self._refuse()

    def stepped(self) -> None:
        """Note that the estimate is used."""
        self._has_estimate = False

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"{self._kind}.training_step must return super().training_step(model, inputs, num_items_in_batch) for every "
            "micro-batch, because its own backward pass moves nothing here; put its loss into compute_loss."
        )
