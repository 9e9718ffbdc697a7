"""Side effects of a loss: every probe of a micro-batch begins with the state from before it, and they happen once.

A subclass's `compute_loss` may append metrics to lists, raise a coefficient with every call, or write features to a queue.
With the state s from before the micro-batch,

    c = [L(ξ + ε·z; s) - L(ξ - ε·z; s)] / 2ε

If the second probe saw the state that the first has left, c would be the difference of the two states over 2ε. After all
evaluations, the state is the one that the first evaluation has left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zo_hf.evaluation.own_modules import is_own

#: Lists with more entries are cut to their earlier length; dictionaries and sets with more entries stay as they are.
MOST_ENTRIES = 10_000
#: Tensors with more elements are copied only if the loss is known to write them; metrics are small.
MOST_ELEMENTS = 64
#: Levels of containers inside of containers.
DEPTH = 5

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_NOT_METRICS = ("train_dataset", "eval_dataset")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Snapshot:
    """The numbers, tensors and containers that hang on an object, to be restored in place.

    Args:
        owner: the object, such as a Trainer; None for modules alone.
        modules: modules whose own attributes, beside those of `nn.Module`, belong to the snapshot.
        written: large tensors that belong to it.
        earlier: a snapshot that is going to be restored before this one.
        tensors_of: returns the tensors of a module that are watched. None watches none.

    Attributes:
        watched: tensors without a copy, each with its version.
    """

    def __init__(
        self,
        owner: Any,
        modules: Iterable[nn.Module] = (),
        written: Container[Tensor] = (),
        earlier: Snapshot | None = None,
        tensors_of: Callable[[nn.Module], Collection[Tensor]] | None = None,
    ) -> None:
        self.watched: list[tuple[Tensor, int]] = []
        self._written, self._earlier, self._tensors_of = written, earlier, tensors_of
        self._saved: dict[int, tuple[Any, Any]] = {}
        if owner is not None:
            attributes = vars(owner)
            self._saved[id(attributes)] = attributes, dict(attributes)
            self._save_all((value for name, value in attributes.items() if name not in _NOT_METRICS), DEPTH)
        for module in modules:
            self._save_module(module, DEPTH)

    def restore(self) -> None:
        """Undo every change of them since."""
        for value, saved in self._saved.values():
            _restore(value, saved)

    def changed_modules(self) -> list[nn.Module]:
        """Return the modules with an attribute that has changed since."""
        return [
            value
            for value, saved in self._saved.values()
            if isinstance(value, nn.Module)
            and (
                _state_of(value).keys() != saved.keys()
                or any(vars(value)[name] is not item or self._has_changed(item, DEPTH) for name, item in saved.items())
            )
        ]

    def _has_changed(self, value: Any, depth: int) -> bool:
        """Return whether a value has changed in place, or one inside of it."""
        if isinstance(value, tuple):
            return depth > 0 and any(self._has_changed(item, depth - 1) for item in value)
        _, saved = self._saved.get(id(value), (None, None))
        if saved is None or isinstance(value, nn.Module):
            return False
        if isinstance(value, Tensor):
            return value._version != saved[0]
        if isinstance(value, set):
            return value != saved
        if isinstance(saved, tuple):  # a long list
            return len(value) != saved[0] + len(saved[1])
        # By identity, because tensors and arrays have no truth value when they are compared.
        if isinstance(value, dict):
            pairs: Any = ((value.get(name, math), item) for name, item in saved.items())
        else:
            pairs = zip(value, saved, strict=False)
        return len(value) != len(saved) or any(
            now is not before or (depth > 0 and self._has_changed(now, depth - 1)) for now, before in pairs
        )

    def _save_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            if not isinstance(value, _PLAIN) and id(value) not in self._saved:
                self._save(value, depth)

    def _save(self, value: Any, depth: int) -> None:
        key = id(value)
        if isinstance(value, Tensor):
            self._save_tensor(value)
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
                start = len(value) if self._earlier is None else self._earlier._length_of(value)
                self._saved[key] = value, (start, value[start:])
        elif isinstance(value, tuple):
            self._save_inner(value, depth)
        elif isinstance(value, nn.Module):
            self._watch(value)
            if is_own(value):
                self._save_module(value, depth - 2)
        elif is_own(value) and isinstance(inner := getattr(value, "__dict__", None), dict):
            self._saved[key] = inner, dict(inner)
            self._save_inner(inner.values(), depth - 2)

    def _save_module(self, module: nn.Module, depth: int) -> None:
        self._saved[id(module)] = module, (state := _state_of(module))
        self._save_inner(state.values(), depth)

    def _save_tensor(self, tensor: Tensor) -> None:
        if tensor.requires_grad or tensor.is_inference() or tensor.is_meta:
            return
        if tensor.numel() <= MOST_ELEMENTS or tensor in self._written:
            self._saved[id(tensor)] = tensor, (tensor._version, tensor.clone())
        else:
            self.watched.append((tensor, tensor._version))

    def _watch(self, module: nn.Module) -> None:
        for tensor in () if self._tensors_of is None else self._tensors_of(module):
            if tensor in self._written:
                self._saved[id(tensor)] = tensor, (tensor._version, tensor.detach().clone())
            elif not tensor.is_inference():
                self.watched.append((tensor, tensor._version))

    def _save_inner(self, values: Iterable[Any], depth: int) -> None:
        if depth > 0:
            self._save_all(values, depth - 1)

    def _length_of(self, value: list) -> int:
        """Return the length of a long list when it was saved."""
        _, saved = self._saved.get(id(value), (None, None))
        return saved[0] + len(saved[1]) if isinstance(saved, tuple) else len(value)


def _state_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module in which its forward may keep something from one call to the next."""
    kinds = (*_PLAIN, Tensor, dict, list, tuple, set, deque)
    return {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE and isinstance(v, kinds)}


def _restore(value: Any, saved: Any) -> None:
    if isinstance(value, dict):
        _restore_dict(value, saved)
    elif isinstance(value, nn.Module):
        for name in _state_of(value).keys() - saved.keys():
            del vars(value)[name]
        vars(value).update(saved)
    elif isinstance(value, set):
        if value != saved:
            value.clear()
            value.update(saved)
    elif isinstance(value, Tensor):
        version, copy = saved
        if value._version != version:
            with torch.no_grad():
                value.copy_(copy)
    elif isinstance(saved, tuple):
        start, tail = saved
        del value[start:]
        value.extend(tail)
    elif len(value) != len(saved) or any(a is not b for a, b in zip(value, saved, strict=True)):
        value.clear()
        value.extend(saved)


def _restore_dict(value: dict, saved: dict) -> None:
    for name in [name for name in value if name not in saved]:
        del value[name]
    for name, item in saved.items():
        if value.get(name, math) is not item:  # a module stands for a missing entry
            value[name] = item
