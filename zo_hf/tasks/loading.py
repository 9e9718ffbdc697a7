"""Files that libraries load: whatever goes wrong in there, an error names the file and the remedy in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Loaded = TypeVar("Loaded")


class LoadError(ValueError):
    """Raised if a file, a folder or a name cannot be loaded; the message is a sentence with the remedy."""


def loaded(what: str, load: Callable[[], Loaded], remedy: str) -> Loaded:
    """Return what a library loads.

    Args:
        what: the file or the option with its value, for the message.
        load: calls the library.
        remedy: the way out, for the message.

    Raises:
        LoadError: the library has raised any exception. Damaged files raise all kinds of them.
    """
    try:
        return load()
    except Exception as error:
        raise LoadError(f"{what} could not be loaded ({reason(error)}); {remedy}.") from error


def reason(error: BaseException) -> str:
    """Return the first line of an error's innermost cause, without the period at its end."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.:')}" if lines else type(error).__name__


def complete_model(what: str, load: Callable[[], tuple[Any, dict[str, Any]]], remedy: str) -> Any:
    """Return a model from `from_pretrained(..., output_loading_info=True)`, which fills missing weights with noise.

    Raises:
        LoadError: it cannot be loaded, or lacks weights.
    """
    model, info = loaded(what, load, remedy)
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise LoadError(f"{what} lacks {len(missing)} weights of its model, such as {missing[0]}; {remedy}.")
    return model
