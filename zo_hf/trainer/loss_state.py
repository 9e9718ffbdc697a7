"""The state that a run's loss reads and changes, so that every probe of a micro-batch begins with the same.

It is what hangs on the Trainer, what the modules of the user's own keep from one forward to the next, and the batch itself.
Tensors are copied before every evaluation only if the loss writes them, which its evaluations show.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from zo_hf.evaluation.own_modules import own_modules
from zo_hf.subspaces.containers import with_values
from zo_hf.trainer.overrides import has_stock_loss
from zo_hf.trainer.own_backward import OwnBackward
from zo_hf.trainer.side_effects import Snapshot

#: Elements of the largest tensor that a loss may write, because every evaluation then copies it. MoCo's queue has half as many.
MOST_ELEMENTS = 2**24


class LossState:
    """The state of a run's loss.

    Args:
        trainer: computes the loss.

    Attributes:
        is_stock: True if the loss is transformers' own code.
        batches: the batches of the run.
        own_backward: looks for backward passes that the loss defines itself.
        repeats: True during an evaluation that leaves no effects, so that the Trainer does not log what it logs.
    """

    repeats = False

    def __init__(self, trainer: Any) -> None:
        self._trainer, self.is_stock, self.batches = trainer, has_stock_loss(trainer), LentBatches()
        self.own_backward = OwnBackward()
        # Of the trained model, only modules that have changed in the first evaluation are looked at in later ones.
        self._modules, self._has_run = list(own_modules(trainer.model)), False
        self._of_model = {id(tensor) for tensor in chain(trainer.model.parameters(), trainer.model.buffers())}
        # Weak, because a loss may get a new teacher or a new queue with every step.
        self._tensors: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
        self._written: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()

    @property
    def may_change(self) -> bool:
        """False if nothing can change from one evaluation to the next."""
        return not self.is_stock or bool(self._modules)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Enter an evaluation that leaves no effects."""
        before, self.repeats = self.repeats, True
        try:
            yield
        finally:
            self.repeats = before

    def before(self) -> Snapshot:
        """Return the state before the first evaluation of a micro-batch."""
        return Snapshot(self._owner, self._modules, self._written, tensors_of=self._tensors_of)

    def after(self, before: Snapshot) -> Snapshot:
        """Return the present state, which is to be restored after `before`."""
        return Snapshot(self._owner, self._modules, self._written, before, self._tensors_of if self._written else None)

    def finds_more(self, before: Snapshot) -> bool:
        """Note what has been written since `before` without a copy, and return whether there is any.

        Raises:
            ValueError: it is too large to copy; the message names the way out.
        """
        if not self._has_run:
            self._modules, self._has_run = before.changed_modules(), True
        found = [tensor for tensor, version in before.watched if tensor._version != version]
        largest = max((tensor.numel() for tensor in found), default=0)
        if largest > MOST_ELEMENTS:
            raise ValueError(
                f"compute_loss of {type(self._trainer).__name__} writes a tensor of {largest:,} elements, and every probe "
                "would write it again; write it in a callback, for example in on_step_end."
            )
        self._written.update((tensor, None) for tensor in found)
        return bool(found)

    @property
    def _owner(self) -> Any:
        return None if self.is_stock else self._trainer

    def _tensors_of(self, module: nn.Module) -> list[Tensor]:
        """Return the tensors of another module than the trained one, such as a teacher."""
        if module not in self._tensors:
            both = chain(module.parameters(), module.buffers())
            self._tensors[module] = [t for t in both if id(t) not in self._of_model and not t.is_meta]
        return self._tensors[module]


class LentBatches:
    """Lends a batch to an evaluation of a loss, which may change its containers and write its tensors.

    Attributes:
        are_written: whether the loss writes tensors of its batches; None before the first evaluation.
    """

    def __init__(self) -> None:
        self.are_written: bool | None = None

    @contextmanager
    def lent(self, batch: Any, is_first: bool = False) -> Iterator[Any]:
        """Yield a batch whose containers are new and whose tensors are the same; afterwards they are as before.

        Args:
            batch: tensors in nested containers.
            is_first: True for its first evaluation, which is repeated if it writes what was believed to stay.

        Raises:
            ValueError: a later one has written that; the message says what to do.
        """
        tensors: dict[int, Tensor] = {}
        lent = _lent(batch, tensors)
        # Copies are kept and not lent: by their identity, tensors of the batch tell which rows they hold.
        versions = [
            (tensor, tensor._version, None if self.are_written is False else tensor.clone())
            for tensor in tensors.values()
            if not tensor.is_inference()
        ]
        yield lent
        written = [(tensor, kept) for tensor, version, kept in versions if tensor._version != version]
        if self.are_written is None or (is_first and not self.are_written):
            self.are_written = bool(written)
        elif written and not self.are_written:
            raise ValueError(
                "the loss writes into a tensor of its batch at some probes only, so a later probe would see what an earlier "
                "one has written; let it write into a copy, as in inputs['input_ids'].clone()."
            )
        with torch.no_grad():
            for tensor, kept in written:
                if kept is not None:  # otherwise all evaluations begin with what the first one has written
                    tensor.copy_(kept)


def _lent(value: Any, tensors: dict[int, Tensor]) -> Any:
    """Return nested containers anew, with the same tensors, which `tensors` gets by their id."""
    if isinstance(value, Tensor):
        tensors[id(value)] = value
        return value
    return with_values(value, lambda item: _lent(item, tensors))
