"""Side effects of a loss on its Trainer, counted once a batch although every probe evaluates the loss.

A subclass's `compute_loss` may append metrics to lists or add up tokens. The first evaluation of a batch keeps its effects,
and those of the later ones are undone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

#: Lists with more entries are cut to their earlier length; dictionaries and sets with more entries stay as they are.
MOST_ENTRIES = 10_000
#: Tensors with more elements stay as they are; metrics are small.
MOST_ELEMENTS = 64
#: Levels of containers inside of containers.
DEPTH = 5

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_NOT_METRICS = ("train_dataset", "eval_dataset")
#: Objects of these packages are no metrics.
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "zo_hf", "builtins", "functools")


class Snapshot:
    """The numbers, small tensors and containers that hang on an object, to be restored in place.

    Args:
        owner: the object, such as a Trainer.
    """

    def __init__(self, owner: Any) -> None:
        attributes = vars(owner)
        self._attributes = attributes, dict(attributes)
        self._saved: dict[int, tuple[Any, Any]] = {}
        self._save_all((value for name, value in attributes.items() if name not in _NOT_METRICS), DEPTH)

    def restore(self) -> None:
        """Undo every change of them since."""
        for value, saved in (self._attributes, *self._saved.values()):
            if isinstance(value, dict):
                _restore_dict(value, saved)
            elif isinstance(value, set):
                if value != saved:
                    value.clear()
                    value.update(saved)
            elif isinstance(value, Tensor):
                version, copy = saved
                if value._version != version:
                    value.copy_(copy)
            elif isinstance(saved, int):
                del value[saved:]
            elif len(value) != len(saved) or any(a is not b for a, b in zip(value, saved, strict=True)):
                value.clear()
                value.extend(saved)

    def _save_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if not isinstance(value, _PLAIN) and id(value) not in self._saved:
                self._save(value, depth)

    def _save(self, value: Any, depth: int) -> None:
        key = id(value)
        if isinstance(value, Tensor):
            if value.numel() <= MOST_ELEMENTS and not value.requires_grad and not value.is_inference():
                self._saved[key] = value, (value._version, value.clone())
        elif isinstance(value, dict):
            if len(value) <= MOST_ENTRIES:
                self._saved[key] = value, dict(value)
                self._save_inner(value.values(), depth)
        elif isinstance(value, set):
            if len(value) <= MOST_ENTRIES:
                self._saved[key] = value, set(value)
        elif isinstance(value, list | deque):
            if len(value) <= MOST_ENTRIES:
                self._saved[key] = value, list(value)
                self._save_inner(value, depth)
            elif isinstance(value, list):
                self._saved[key] = value, len(value)
        elif type(value).__module__.partition(".")[0] not in _PACKAGES and isinstance(
            inner := getattr(value, "__dict__", None), dict
        ):
            self._saved[key] = inner, dict(inner)
            self._save_inner(inner.values(), depth - 2)

    def _save_inner(self, values: Iterable[Any], depth: int) -> None:
        if depth > 0:
            self._save_all(values, depth - 1)


def _restore_dict(value: dict, saved: dict) -> None:
    for name in [name for name in value if name not in saved]:
        del value[name]
    for name, item in saved.items():
        if value.get(name, math) is not item:  # a module stands for a missing entry
            value[name] = item
