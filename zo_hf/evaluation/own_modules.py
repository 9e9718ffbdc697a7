"""Objects of the user's own classes, whose code may keep or write anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

#: Classes of these packages are known to keep nothing from one forward to the next, other than caches and buffers.
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "zo_hf", "builtins", "functools")


def is_own(value: Any) -> bool:
    """Return whether an object is of a class of the user's own."""
    return is_own_class(type(value))


def is_own_class(kind: type, known: Sequence[str] = ()) -> bool:
    """Return whether a class is the user's own.

    Args:
        kind: the class.
        known: packages whose classes are not, beside those that this module knows.
    """
    return kind.__module__.partition(".")[0] not in (*_PACKAGES, *known)


def own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model whose classes are the user's own."""
    return (module for module in model.modules() if is_own(module))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that code of the user's own may write in a forward, by name.

    A model with adapters of PEFT has none, because PEFT writes some parameters in a forward and writes them back.
    """
    if any(_package(module) == "peft" for module in model.modules()):
        return {}
    below = {id(parameter) for module in own_modules(model) for parameter in module.parameters()}
    named = model.named_parameters() if below else ()
    return {name: p for name, p in named if id(p) in below and not (p.is_meta or p.is_inference())}


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]
